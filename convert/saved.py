"""The way back from directories that transformers itself saved, whose settings are those of `config.json`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from convert.checkpoint.dictionary import SPECIAL, Dictionary
from convert.checkpoint.writer import NewTensor
from convert.directory import ModelDirectory
from convert.draft import Draft, stored
from convert.errors import PlanError, Problem
from convert.families import FAMILIES, Family
from convert.families.base import FromConfig
from convert.families.encoder_settings import ACTIVATIONS
from convert.files import WIDTHS
from convert.rules import Table
from convert.typed import Misfit, read

# What a model in transformers may still call the positional convolution's weight norm (before torch 2.1).
_ALIASES = {"conv.weight_g": "conv.parametrizations.weight.original0"}
_ALIASES["conv.weight_v"] = "conv.parametrizations.weight.original1"
_NEVER = -1e4  # the bias of symbols that fairseq's dictionary must have and the model never learned


@dataclass(frozen=True, slots=True)
class _Config:
    """The types of what is read of a config.json that transformers saved; what is absent has transformers' default."""

    conv_dim: tuple[int, ...]
    conv_kernel: tuple[int, ...]
    conv_stride: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_conv_pos_embeddings: int = 1
    num_conv_pos_embedding_groups: int = 1
    num_codevector_groups: int = 1
    num_codevectors_per_group: int = 1
    codevector_dim: int = 1
    proj_codevector_dim: int = 1
    pad_token_id: int | None = None
    conv_bias: bool = False
    apply_spec_augment: bool = False
    ctc_zero_infinity: bool = False
    feat_extract_norm: str = ""

    def __post_init__(self) -> None:
        convolutions = (self.conv_dim, self.conv_kernel, self.conv_stride)
        if not 0 < len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ValueError("conv_dim")
        counts = {name: getattr(self, name) for name, kind in self.__annotations__.items() if kind == "int"}
        for name, count in [*counts.items(), *(("conv_dim", count) for counted in convolutions for count in counted)]:
            if not 0 < count < 2**31:
                raise ValueError(name)


def from_config(directory: ModelDirectory) -> Draft:
    """Decide what a directory that transformers saved becomes, or refuse it.

    Args:
        directory: with settings in `config.json` and the vocabulary in `vocab.json`.

    Raises:
        PlanError: the model has no fairseq counterpart; every reason is in `problems`.
    """
    config = directory.config
    family, way, head, problems = _from_class(config)
    if problems:
        raise PlanError(f"{directory.path} has no fairseq counterpart", code="unsupported", problems=problems)
    try:
        said = read(_Config, config)
        numbers = {key: config[key] for key in way.numbers if config.get(key) is not None}
        wrong = [
            key for key, value in numbers.items() if not isinstance(value, (int, float)) or not math.isfinite(value)
        ]
        if wrong or said.num_hidden_layers > len(directory.tensors):
            raise Misfit((*wrong, "num_hidden_layers")[0])
    except (Misfit, OverflowError) as error:
        message = f"{directory.path}: config.json: {error}: not what a {config['architectures'][0]} has"
        raise PlanError(message, code="bad-setting", key=str(error)) from None
    names = {_alias(name): name for name in directory.tensors}
    mask = f"{family.name}.masked_spec_embed"  # transformers has none without masking
    lm_head = directory.tensors.get("lm_head.bias")
    layout = way.layout(config, head, lm_head.spec.shape[0] if lm_head else 0)
    made = _table(family, layout, directory, names, mask)
    draft = Draft({}, {"cfg": _settings(way, head, directory)}, None, ["settings come from config.json"])
    for target, source in made.inverse.renames.items():
        if target == mask and target not in names:
            width = config["hidden_size"]
            draft.tensors[source] = NewTensor("F32", (width,), functools.partial(list, [bytes(4 * width)]))
            draft.notes.append(f"{source}: zeros, the model never masks")
        else:
            draft.tensors[source] = stored(directory, directory.tensors[names[target]])
    if head == "ctc":
        _vocabulary(directory, config, draft)
    return draft


def _alias(name: str) -> str:
    return next((name.removesuffix(old) + new for old, new in _ALIASES.items() if name.endswith(old)), name)


def _from_class(config: Mapping[str, Any]) -> tuple[Family, FromConfig, str, list[Problem]]:
    """Find the family and the kind of checkpoint of a class of transformers, and what of its configuration fairseq lacks."""
    ways = [(family, family.from_config) for family in FAMILIES.values() if family.from_config]
    known = {family.classes[kind]: (family, way, kind) for family, way in ways for kind in way.kinds}
    stated = config.get("architectures")
    named = [name for name in stated if name in list(known)] if isinstance(stated, list) else []
    family, way, head = known[named[0]] if named else (*ways[0], "")
    problems = []
    if config.get("model_type") != family.model_type or not head:
        found = f"{config.get('model_type')}, {config.get('architectures')}"
        problems.append(
            Problem("unsupported-architecture", "architectures", f"{', '.join(known)} expected, {found} found")
        )
    if config.get("add_adapter") or config.get("adapter_attn_dim"):
        problems.append(
            Problem(
                "unsupported-setting",
                "adapter",
                "adapters are restored from a directory of this tool, not from config.json",
            )
        )
    if config.get("hidden_act", "gelu") not in list(ACTIVATIONS.values()):
        problems.append(Problem("unsupported-setting", "hidden_act", f"{config.get('hidden_act')!r} has no equivalent"))
    if config.get("feat_extract_activation", "gelu") != "gelu" or config.get("layer_norm_eps", 1e-5) != 1e-5:
        problems.append(Problem("unsupported-setting", "feat_extract_activation, layer_norm_eps", "gelu and 1e-5 only"))
    return family, way, head, problems


def _table(family: Family, layout: Any, directory: ModelDirectory, names: Mapping[str, str], mask: str) -> Table:
    """Make the table of a transformers model, and hold it against the tensors that are there."""
    made = family.table(layout, "", ())
    problems = [Problem("missing-tensor", key, "is not in the model") for key in made.shapes if key not in names]
    problems = [problem for problem in problems if problem.key != mask]
    problems += [
        Problem("unexpected-tensor", key, "has no place in fairseq's model") for key in names.keys() - made.shapes
    ]
    for key, shape in made.shapes.items():
        if key in names and directory.tensors[names[key]].spec.shape != shape:
            found = directory.tensors[names[key]].spec.shape
            problems.append(Problem("shape", key, f"the model has {found}, config.json says {shape}"))
    for key in made.fills:  # equal widths: fairseq has no projection, so that the model's must do nothing
        if key in names and not _does_nothing(directory, names[key]):
            problems.append(
                Problem("projection", key, "fairseq has no projection between equal widths; this one is used")
            )
    if problems:
        raise PlanError(f"{directory.path} does not fit fairseq's model", code="incomplete", problems=problems)
    return made


def _does_nothing(directory: ModelDirectory, name: str) -> bool:
    import numpy as np

    spec = directory.tensors[name].spec
    if spec.dtype != "F32":
        return False
    value = np.frombuffer(directory.read(name), np.float32).reshape(spec.shape)
    return bool(np.array_equal(value, np.eye(*spec.shape) if len(spec.shape) == 2 else np.zeros(spec.shape)))


def _settings(way: FromConfig, head: str, directory: ModelDirectory) -> dict[str, Any]:
    """fairseq's settings from config.json; what it does not say has transformers' default."""
    features: dict[str, Any] = {}
    if (directory.path / "preprocessor_config.json").is_file():
        features = directory.json("preprocessor_config.json")
    elif (directory.path / "processor_config.json").is_file():
        features = directory.json("processor_config.json").get("feature_extractor", {})
    if not isinstance(features, dict) or not isinstance(features.get("do_normalize"), bool):
        raise PlanError(
            f"{directory.path} does not say whether its input is normalised (no preprocessor_config.json)",
            code="missing-setting",
            key="do_normalize",
            hint="save the model's feature extractor beside it",
        )
    return way.settings(directory.config, features, head)


def _vocabulary(directory: ModelDirectory, config: Mapping[str, Any], draft: Draft) -> None:
    """Bring the vocabulary into fairseq's order: the blank first, then `<pad>`, `</s>`, `<unk>`, then the rest.

    A model whose vocabulary has that order keeps its head's bytes. Another one has its rows permuted, and rows that
    fairseq must have and the model does not get zeros and a bias that keeps them from ever being chosen.
    """
    ids = {token: index for token, index in directory.json("vocab.json").items() if isinstance(index, int)}
    rows = draft.tensors["w2v_encoder.proj.bias"].shape[0]
    symbols = [token for token, _ in sorted(ids.items(), key=lambda item: item[1])]
    blank = config.get("pad_token_id", 0)
    if sorted(ids.values()) != list(range(rows)) or blank not in range(rows):
        detail = f"vocab.json names {len(ids)} ids, the head has {rows} rows, config.json's pad_token_id is {blank}"
        raise PlanError(f"{directory.path}: {detail}", code="dictionary-size", key="vocab.json")
    if blank == 0 and len(symbols) > 4 and symbols[2:4] == list(SPECIAL[2:]) and set(symbols[:2]) == set(SPECIAL[:2]):
        symbols[:2] = SPECIAL[:2]
        draft.dictionary = Dictionary(tuple(symbols), (1,) * rows)
        return
    known = {"<s>": blank, "</s>": ids.get("</s>"), "<unk>": ids.get("<unk>", ids.get("[UNK]"))}
    order: list[int | None] = [known["<s>"], None, known["</s>"], known["<unk>"]]
    order += [index for index in range(rows) if index not in order]
    names = [*SPECIAL, *(symbols[index] for index in order[4:] if index is not None)]
    draft.dictionary = Dictionary(tuple(names), (1,) * len(names))
    draft.notes.append(f"the head's {rows} rows were brought into fairseq's order of {len(names)} symbols")
    for key, filler in (("w2v_encoder.proj.weight", 0.0), ("w2v_encoder.proj.bias", _NEVER)):
        draft.tensors[key] = _permuted(draft.tensors[key], order, filler)


def _permuted(tensor: NewTensor, order: list[int | None], filler: float) -> NewTensor:
    def pieces() -> Iterator[bytes]:
        import numpy as np

        from convert.pieces import cast

        data = b"".join(tensor.pieces())
        width = len(data) // tensor.shape[0]
        row = cast(np.full(width // WIDTHS[tensor.dtype], filler, np.float32), "F32", tensor.dtype)
        yield b"".join(row if index is None else data[index * width : (index + 1) * width] for index in order)

    return replace(tensor, shape=(len(order), *tensor.shape[1:]), pieces=pieces)
