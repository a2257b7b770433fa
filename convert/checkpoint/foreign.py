"""What a file is that is not a checkpoint, recognised by its first bytes, and what to do with it."""

from __future__ import annotations

import re
from pathlib import Path

from convert.checkpoint.container import unreadable
from convert.errors import CheckpointError
from convert.report import quoted, size

_UNPACK = "unpack it, and name the checkpoint inside"
_CHECKPOINT = "name a checkpoint, such as checkpoint_best.pt"
# first bytes -> what begins so, and what to do
# fmt: off
_MAGIC = {
    b"\x1f\x8b":                   ("is a gzip archive",                           _UNPACK),
    b"BZh":                        ("is a bzip2 archive",                          _UNPACK),
    b"\xfd7zXZ\0":                 ("is an xz archive",                            _UNPACK),
    b"\x28\xb5\x2f\xfd":           ("is a zstandard archive",                      _UNPACK),
    b"7z\xbc\xaf\x27\x1c":         ("is a 7z archive",                             _UNPACK),
    b"Rar!\x1a\x07":               ("is a rar archive",                            _UNPACK),
    b"\x89HDF\r\n\x1a\n":          ("is an HDF5 file, such as Keras writes",       _CHECKPOINT),
    b"\x93NUMPY":                  ("is a numpy array",                            _CHECKPOINT),
    b"GGUF":                       ("is a GGUF model, of llama.cpp",               _CHECKPOINT),
}
# fmt: on
_ONNX = re.compile(rb"\x08[\x01-\x1f]\x12([\x01-\x40])([\w .+-]+)", re.ASCII)  # ir_version, then producer_name
_POINTER = b"version https://git-lfs.github.com/spec/"


def file(path: Path, head: bytes, *, index: bool = False) -> CheckpointError:
    """Make the error for a file that is something else.

    Args:
        path: the file.
        head: its first bytes, 512 if there are so many.
        index: whether it is a pickle that names the storages of torch's zip layout, and holds none.
    """
    what, hint = _of(path, head, index)
    return unreadable(path, what, "foreign-file", hint)


def _of(path: Path, head: bytes, index: bool) -> tuple[str, str]:
    found = next((meaning for magic, meaning in _MAGIC.items() if head.startswith(magic)), None)
    if found:
        return found
    if head.startswith(_POINTER):
        count = re.search(rb"\nsize (\d{1,15})\n", head)
        large = f" of {size(int(count[1]))}" if count else ""
        return f"is a Git LFS pointer: a text that stands for the file{large}, which was not downloaded", (
            f"run `git lfs pull` in the repository that {path.name} is from, or download it from the repository's page"
        )
    onnx = _ONNX.match(head)
    if onnx and len(onnx[2]) >= onnx[1][0]:
        made = onnx[2][: onnx[1][0]].decode("ascii", "replace")
        what = f"is an ONNX model (made by {made}): a graph, without fairseq's settings and most of the tensors' names"
        return what, "name the checkpoint that it was exported from"
    if head[257:262] == b"ustar":
        return "is a tar archive", _UNPACK
    if index:
        what = "is the index of a checkpoint, without its tensors: a zip file that was unpacked"
        return what, _zip(path.resolve().parent)
    if head[:1] == b"\x80":
        return "is a pickle that torch.save did not write", _CHECKPOINT
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "is a web page: the download failed", "download the file itself, not the page that shows it"
    if _is_text(head):
        return "is a text file", _CHECKPOINT
    return f"begins with the bytes {head[:4].hex(' ')}, as no file of torch.save or safetensors does", _CHECKPOINT


def _is_text(head: bytes) -> bool:
    if re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", head):
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def archive_of(path: Path, names: list[str]) -> CheckpointError:
    """Make the error for a zip file without torch's index."""
    files = [name for name in names if not name.endswith("/")]
    models = [name for name in files if name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors"))]
    if models:
        more = "" if len(models) < 4 else f" and {len(models) - 3} more"
        return unreadable(path, f"is a zip archive that holds {', '.join(models[:3])}{more}", "foreign-file", _UNPACK)
    what = f"is a zip archive without torch's data.pkl; it holds {', '.join(files[:3]) or 'nothing'}"
    return unreadable(path, what + (", ..." if len(files) > 3 else ""), "foreign-file", _CHECKPOINT)


def _zip(folder: Path) -> str:
    name = quoted(folder.name)
    return f"zip it back without compression, from the folder above: zip -0 -r {quoted(folder.name + '.pt')} {name}"


def directory(path: Path) -> CheckpointError:
    """Make the error for a directory."""
    there = sorted(entry.name for entry in path.iterdir())
    unpacked = [folder for folder in (path, *(path / name for name in there)) if (folder / "data.pkl").is_file()]
    if unpacked:
        what = "is an unpacked checkpoint: the folder of a zip file that was torch's"
        return unreadable(path, what, "directory", _zip(unpacked[0].resolve()))
    if "config.json" in there and any(name.endswith((".safetensors", ".bin")) for name in there):
        hint = "load it with transformers; `fairseq-to-hf restore` makes a fairseq checkpoint of it"
        return unreadable(
            path, "is a directory that transformers loads: it holds config.json and weights", "directory", hint
        )
    models = [name for name in there if name.endswith(".pt")]
    if models:
        hint = f"name one of them, such as {models[0]}; `convert {quoted(path.name)} OUT --all` converts each"
        return unreadable(path, f"is a directory that holds {len(models)} .pt files", "directory", hint)
    return unreadable(path, "is a directory, and holds no .pt file", "directory", _CHECKPOINT)
