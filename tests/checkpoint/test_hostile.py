"""Checkpoints that want to run something: nothing runs, nothing is written, and the error names the call."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq_models import build, save
from torch_files import before, change_pickle, text

from convert.checkpoint import is_harmful, is_harmless
from convert.errors import ConvertError
from convert.package import convert

SECONDS = 30


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder, model = tmp_path_factory.mktemp("clean"), build("ctc_base")
    return {
        kind: save("ctc_base", folder / f"{kind}.pt", container=kind, model=model).read_bytes()
        for kind in ("zip", "legacy")
    }


def execute(name: str, command: bytes = text("touch canary")) -> bytes:
    """GLOBAL and REDUCE with one argument."""
    module, _, last = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + last.encode() + b"\n" + command + b"\x85R"


SHELL, CODE = text("touch canary"), text("__import__('os').system('touch canary')")
INNER = pickle.dumps("inner", 2)[:2] + execute("os.system") + b"."
# What runs `touch canary` in Python's own unpickler.
ARMED = {
    "os.system": execute("os.system"),
    "posix.system": execute("posix.system"),
    "builtins.eval": execute("__builtin__.eval", CODE),
    "builtins.exec": execute("builtins.exec", CODE),
    "getattr-chain": b"cbuiltins\ngetattr\n(cos\nsystem\n" + text("__call__") + b"tR" + SHELL + b"\x85R",
    "getattr-of-module": b"cbuiltins\ngetattr\n("
    + execute("importlib.import_module", text("os"))
    + text("system")
    + b"tR"
    + SHELL
    + b"\x85R",
    "dotted-name": b"\x80\x04" + text("argparse") + text("_os.system") + b"\x93" + SHELL + b"\x85R",
    "stack-global": text("os") + text("system") + b"\x93" + SHELL + b"\x85R",
    "stack-global-short": b"\x8c\x02os\x94\x8c\x06system\x94\x93" + SHELL + b"\x85R",
    "inst": b"(" + SHELL + b"ios\nsystem\n",
    "inst-protocol-0": b"(S'touch canary'\nios\nsystem\n",
    "obj": b"(cos\nsystem\n" + SHELL + b"o",
    "newobj": b"cfunctools\npartial\ncos\nsystem\n\x85\x81" + SHELL + b"\x85R",
    "newobj-ex": b"cfunctools\npartial\ncos\nsystem\n\x85}\x92" + SHELL + b"\x85R",
    "build": b"cargparse\nNamespace\n)\x81}" + text("__setstate__") + b"cos\nsystem\nsb" + SHELL + b"b",
    "copyreg-reconstructor": b"ccopyreg\n_reconstructor\n(cfunctools\npartial\ncfunctools\npartial\ncos\nsystem\ntR"
    + SHELL
    + b"\x85R",
    "copyreg-extension": b"ccopyreg\nadd_extension\n("
    + text("os")
    + text("system")
    + b"K\x07tR0\x82\x07"
    + SHELL
    + b"\x85R",
    "map": b"c__builtin__\nlist\n(c__builtin__\nmap\n(cos\nsystem\n](" + SHELL + b"etRtR",
    "defaultdict-factory": b"ccollections\ndefaultdict\ncos\ngetcwd\n\x85R0" + execute("os.system"),
    "pickle.loads": b"c_pickle\nloads\nC" + bytes([len(INNER)]) + INNER + b"\x85R",
    "setitem-modules": b"csys\nmodules\n" + text("collections") + b"cos\nsystem\ns0" + execute("os.system"),
    "runpy": b"crunpy\n_run_code\n(" + CODE + b"}tR",
    "memoized": b"cos\nsystem\nr\xff\xff\0\x000j\xff\xff\0\0" + SHELL + b"\x85R",
}
# What Python's unpickler would not run here, and no trainer writes either: gadget -> code
REFUSED = {
    "torch.load": (execute("torch.load", text("inner.pt")), "hostile-pickle"),
    "torch.hub.load": (execute("torch.hub.load", text("inner")), "hostile-pickle"),
    "torch.storage._load_from_bytes": (execute("torch.storage._load_from_bytes", b"C\x01a"), "hostile-pickle"),
    "numpy.load": (execute("numpy.load", text("inner.npy")), "hostile-pickle"),
    "webbrowser.open": (execute("webbrowser.open", text("about:blank")), "hostile-pickle"),
    "ext1": (b"\x82\x01", "corrupted-pickle"),
    "ext2": (b"\x83\x01\0", "corrupted-pickle"),
    "ext4": (b"\x84\x01\0\0\0", "corrupted-pickle"),
    "text-persistent-id": (b"Pos.system\n", "corrupted-pickle"),
    "persistent-id-of-global": (b"(cos\nsystem\nNNNNtQ", "corrupted-pickle"),
    "out-of-band-buffer": (b"\x97\x98", "corrupted-pickle"),
    "call-of-a-value": (text("os.system") + SHELL + b"\x85R", "corrupted-pickle"),
    "call-of-a-result": (b"ccollections\nOrderedDict\n)R)R", "corrupted-pickle"),
    "global-without-a-name": (b"NN\x93", "corrupted-pickle"),
}


def refused(path: Path, folder: Path) -> ConvertError:
    with pytest.raises(ConvertError) as raised:
        convert(path, folder / "model")
    assert {entry.name for entry in folder.iterdir()} == {path.name}, "something ran, or was left behind"
    return raised.value


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("gadget", ARMED)
def test_nothing_is_executed(
    gadget: str, container: str, checkpoints: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pt"
    path.write_bytes(checkpoints[container])
    error = refused(change_pickle(path, before(ARMED[gadget])), tmp_path)
    assert error.code in ("hostile-pickle", "corrupted-pickle")
    assert error.status == 2
    assert "executed" in error.message


@pytest.mark.parametrize("gadget", ARMED)
def test_the_gadget_is_armed(gadget: str, tmp_path: Path) -> None:
    (tmp_path / "armed.pkl").write_bytes(b"\x80\x02" + ARMED[gadget] + b"0N.")
    program = "import pickle; pickle.load(open('armed.pkl', 'rb'))"
    subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, timeout=SECONDS)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("gadget", REFUSED)
def test_refused(gadget: str, checkpoints: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "hostile.pt"
    path.write_bytes(checkpoints["zip"])
    assert refused(change_pickle(path, before(REFUSED[gadget][0])), tmp_path).code == REFUSED[gadget][1]


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_harmless_value_in_the_same_place_converts(
    container: str, checkpoints: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "harmless.pt"
    path.write_bytes(checkpoints[container])
    convert(
        change_pickle(path, before(b"cargparse\nNamespace\n)\x81}" + text("seed") + b"K\x01sb")), tmp_path / "model"
    )


def test_error_names_the_call(checkpoints: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "hostile.pt"
    path.write_bytes(checkpoints["zip"])
    error = refused(change_pickle(path, before(ARMED["os.system"])), tmp_path)
    assert (
        error.message == "hostile.pt: its pickle wants to call os.system; it was not executed, and nothing was written"
    )
    assert error.problems[0].key == "os.system"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "fairseq.checkpoint_utils.load_checkpoint_to_cpu",
            "fairseq.utils.import_user_module",
            "fairseq.utils.os.system",
        ),
        *("fairseq.file_io.PathManager", "omegaconf.OmegaConf.load", "collections.OrderedDict.__class__", "os.system"),
    ],
)
def test_not_harmless_for_a_real_unpickler(name: str) -> None:
    assert not is_harmless(name)


@pytest.mark.parametrize(
    "name",
    [
        *("fairseq.data.dictionary.Dictionary", "fairseq.meters.AverageMeter", "fairseq.dataclass.constants.Choices"),
        *("fairseq.dataclass.configs.FairseqConfig", "fairseq.models.wav2vec.wav2vec2.Wav2Vec2Config"),
        *("omegaconf.dictconfig.DictConfig", "omegaconf.nodes.AnyNode", "omegaconf.base.ContainerMetadata"),
        *(
            "argparse.Namespace",
            "torch._utils._rebuild_tensor_v2",
            "torch.FloatStorage",
            "numpy.core.multiarray.scalar",
        ),
    ],
)
def test_harmless(name: str) -> None:
    assert is_harmless(name)
    assert not is_harmful(name)
