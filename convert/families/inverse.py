"""From transformers' settings to fairseq's: a family's `Settings` read from right to left, and what does not come back.

What the maps of a family cannot say alone is in `Family.from_config`, and what a head adds in `Kind.from_config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from convert.errors import Problem
from convert.families.base import Family, Kind
from convert.families.encoder_settings import FINE_TUNING
from convert.families.settings import MISSING, Limit, Reader, Settings, Value

# fields that no output of a trained model depends on: of training, ...
_TRAINING = re.compile(r"(no_)?mask_\w+|\w*dropout|\w*layerdrop|apply_spec_augment|ctc_(loss_reduction|zero_infinity)")
_LOSS = {"contrastive_logits_temperature", "diversity_loss_weight", "num_negatives"}
# ... and of no model: of heads that the class does not have, of other tasks, of transformers itself, and of the vocabulary,
# which is compared with the weights
_ELSEWHERE = {
    *("_name_or_path", "architectures", "dtype", "model_type", "torch_dtype", "transformers_version"),
    *("chunk_size_feed_forward", "finetuning_task", "freeze_feat_extract_train", "gradient_checkpointing"),
    *("initializer_range", "output_attentions", "output_hidden_states", "problem_type", "return_dict", "use_cache"),
    *("adapter_kernel_size", "adapter_stride", "num_adapter_layers", "output_hidden_size"),
    *("classifier_proj_size", "id2label", "label2id", "num_ctc_classes", "num_labels", "tokenizer_class"),
    *("tdnn_dilation", "tdnn_dim", "tdnn_kernel", "xvector_output_dim"),
    *(
        "codevector_dim",
        "num_codevector_groups",
        "num_codevectors_per_group",
        "proj_codevector_dim",
    ),  # of WavLM's configuration
    *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"),
    "max_source_positions",  # of a table that grows on demand
}


def settings_from(
    config: Reader, family: Family, kind: Kind, head: str, architecture: str, sound: Mapping[str, Any]
) -> dict[str, Any]:
    """Translate `config.json` into the settings of a checkpoint.

    Args:
        config: its values; what is wrong is added to its problems.
        family: the family of the encoder.
        kind: the kind of checkpoint to make.
        head: the head that the class has; `encoder` for none.
        architecture: fairseq's name of what is made.
        sound: the task's settings of waveforms: `normalize` and `sample_rate`.

    Returns:
        The sections `model`, `task` and `criterion`.
    """
    model = _encoder(config, family, head)
    model |= {"normalize": sound["normalize"]} if "normalize" in family.settings.read else {}
    task = {"data": "", **sound}
    made = {"model": model, "task": {"_name": family.kinds["pretraining"].task, **task}, "criterion": {}}
    own = kind.from_config(config) if kind.from_config else {}
    if kind.nested:
        replaced = {name: model[own] for name, own in FINE_TUNING.items() if own in model}
        outer = {"_name": architecture, "w2v_args": made, "w2v_path": "", "data": "", "normalize": sound["normalize"]}
        made = {"model": outer | replaced, "task": {"_name": kind.task, **task}, "criterion": {}}
    return {section: values | own.get(section, {}) for section, values in made.items()}


def _encoder(config: Reader, family: Family, head: str) -> dict[str, Any]:
    fields, (name, layer) = family.settings, family.encoders[0]
    model: dict[str, Any] = {"_name": name} | ({} if layer == "transformer" else {"layer_type": layer})
    model |= {limit.field: limit.value for limit in fields.limits if _states(limit, head)}
    for setting, target in fields.same.items():
        default = fields.absent.get(target, MISSING)
        if setting in fields.counts:
            model[setting] = config.count(target, default)
        else:
            model[setting] = config.get(target, bool if setting in fields.flags else float, default)
    for setting, (target, words) in fields.choices.items():
        given = config.get(target, str, fields.absent.get(target, MISSING))
        known = {value: word for word, value in reversed([*words.items()])}
        if given and given not in known:
            detail = f"{given!r} has no equivalent in fairseq; known: {', '.join(known)}"
            config.problems.append(Problem("unsupported-setting", target, detail))
        model[setting] = known.get(given, "")
    columns = [config.get(name, list) for name in ("conv_dim", "conv_kernel", "conv_stride")]
    if len({len(column) for column in columns}) != 1:
        config.problems.append(
            Problem("bad-setting", "conv_dim", "as many numbers as in conv_kernel, conv_stride expected")
        )
    model["conv_feature_layers"] = str(list(zip(*columns, strict=False)))
    model["mask_prob"] = config.get("mask_time_prob", float, fields.absent["mask_time_prob"])
    return model | (family.from_config(config) if family.from_config else {})


def _states(limit: Limit, head: str) -> bool:
    return limit.value is not MISSING and (not limit.heads or head in limit.heads)


def differing(config: Reader, fields: Settings, made: Iterable[Value]) -> tuple[list[Problem], list[str]]:
    """Compare `config.json` with what a conversion makes of the settings that were made of it.

    Args:
        config: its values, with the names of those that were read.
        fields: the family's settings.
        made: the values that the conversion makes.

    Returns:
        What shows in outputs, each a reason to refuse; and the fields that act while training only.
    """
    problems, training = [], []
    meant = {value.name: value for value in made}
    known = {problem.key for problem in config.problems}
    for name in sorted({*config.values, *(meant.keys() & fields.absent.keys())} - known):
        found = config.values.get(name, fields.absent.get(name))
        same = name in meant and _plain(found) == _plain(meant[name].value)
        if same or (name in _ELSEWHERE and name not in config.used):
            continue
        if _TRAINING.fullmatch(name) or name in _LOSS:
            training += [name] if name in meant and name in config.values else []
        elif name in meant:
            detail = f"is {found!r}, and with fairseq it is always {meant[name].value!r}: {meant[name].origin}"
            problems.append(Problem("unsupported-setting", name, detail))
        elif found and name not in config.used:
            problems.append(Problem("unknown-setting", name, f"is {str(found)[:60]!r}: fairseq has no such setting"))
    return problems, training


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
