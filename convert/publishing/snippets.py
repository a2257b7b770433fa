"""The Python that a card shows; tests run every line of it as it stands."""

from __future__ import annotations

from convert.publishing.facts import Facts

_LOAD = """\
repository = "{repo}"
revision = "{revision}"{remark}
processor = AutoProcessor.from_pretrained(repository, revision=revision)
model = {name}.from_pretrained(repository, revision=revision).eval()
"""

_TRANSCRIBE = """\
import io

import soundfile
import torch
from datasets import Audio, load_dataset
from transformers import AutoProcessor, {name}

{load}
# one utterance of LibriSpeech; for a recording of your own: soundfile.read("speech.wav", dtype="float32")
dataset = load_dataset("hf-internal-testing/librispeech_asr_dummy", "clean", split="validation")
row = dataset.cast_column("audio", Audio(decode=False))[0]
speech, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")

inputs = processor(speech, sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(processor.batch_decode(logits.argmax(dim=-1))[0])
"""

_OWN_FILE = """\
import soundfile
import torch
from transformers import {processor}, {name}

{load}
speech, rate = soundfile.read("speech.wav", dtype="float32")  # {hertz} Hz, one channel
inputs = processor(speech, sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
{use}
"""

_LIBRISPEECH = """\
import io

import jiwer
import soundfile
import torch
from datasets import Audio, load_dataset
from transformers import AutoProcessor, {name}

device = "cuda" if torch.cuda.is_available() else "cpu"
{load}model = model.to(device)

for part in ("clean", "other"):
    rows = load_dataset("openslr/librispeech_asr", part, split="test", streaming=True)
    expected, heard = [], []
    for row in rows.cast_column("audio", Audio(decode=False)):
        speech, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        inputs = processor(speech, sampling_rate=rate, return_tensors="pt").to(device)
        with torch.no_grad():
            logits = model(**inputs).logits
        expected.append(row["text"])
        heard.append(processor.batch_decode(logits.argmax(dim=-1))[0])
    print(part, f"WER {{100 * jiwer.wer(expected, heard):.2f}} %", f"CER {{100 * jiwer.cer(expected, heard):.2f}} %")
"""


def librispeech(facts: Facts) -> bool:
    """Whether LibriSpeech's test sets say something about the model: English letters, and LibriSpeech in its training."""
    return facts.ctc and facts.letters and "en" in facts.language and "openslr/librispeech_asr" in facts.datasets


def usage(facts: Facts) -> str:
    """Return the snippet that uses the model."""
    if facts.ctc and facts.letters and "en" in facts.language:
        return _TRANSCRIBE.format(name=facts.class_name, load=_load(facts))
    use = "print(processor.batch_decode(outputs.logits.argmax(dim=-1))[0])"
    if not facts.ctc:
        use = "print({name: tuple(value.shape) for name, value in outputs.items() if torch.is_tensor(value)})"
    processor = "AutoProcessor" if facts.ctc else "AutoFeatureExtractor"
    load = _load(facts).replace("AutoProcessor", processor)
    hertz = facts.preprocessor.get("sampling_rate", 16000)
    return _OWN_FILE.format(name=facts.class_name, load=load, use=use, processor=processor, hertz=hertz)


def evaluation(facts: Facts) -> str:
    """Return the snippet that measures the word error rate on LibriSpeech's two test sets."""
    return _LIBRISPEECH.format(name=facts.class_name, load=_load(facts))


def _load(facts: Facts) -> str:
    remark = "  # exactly the files this card speaks of" if facts.pin else "  # pin the commit that you have checked"
    return _LOAD.format(repo=facts.repo_id, revision=facts.pin or "main", remark=remark, name=facts.class_name)
