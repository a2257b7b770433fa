"""fairseq's side of a verification, in small files that any Python (3.7+) with torch (1.6+) and fairseq (0.10 to main) can run.

`opening.open_reference` builds fairseq's model from a request and fills it with a checkpoint's tensors; `recording.record`
runs it and writes every stage and output to a safetensors file. Each family and each head has a file of its own, found in
this folder by what it declares (`ENCODERS`, `ARCHITECTURES`, `patched`).

Nothing here imports the rest of this project: `python fairseq_side REQUEST.json` runs the folder by itself.
"""
