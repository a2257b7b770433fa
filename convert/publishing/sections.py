"""The card's text, section by section, each written from the facts and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeGuard
from urllib.parse import quote

from convert.checkpoint.opened import UNSEEN
from convert.conversion import Dropped, Edited, Filled, Source
from convert.publishing import snippets
from convert.publishing.facts import Facts, Paper
from convert.publishing.files import private
from convert.publishing.proof import proof, table
from convert.publishing.text import code, text
from convert.publishing.verified import Result
from convert.report import fold, padding_text, quoted, size

# The settings of a fairseq checkpoint that decide what the network computes.
_SETTINGS = (
    ("model", "_name"),
    ("model", "encoder_layers"),
    ("model", "encoder_embed_dim"),
    ("model", "encoder_ffn_embed_dim"),
    ("model", "encoder_attention_heads"),
    ("model", "activation_fn"),
    ("model", "layer_norm_first"),
    ("model", "extractor_mode"),
    ("model", "conv_feature_layers"),
    ("model", "conv_bias"),
    ("model", "conv_pos"),
    ("model", "conv_pos_groups"),
    ("task", "_name"),
    ("task", "sample_rate"),
    ("task", "normalize"),
    ("task", "labels"),
    ("criterion", "_name"),
)


def body(facts: Facts, level: int) -> str:
    """Write our part of the card in Markdown.

    Args:
        facts: what is known.
        level: the level of its title; 1 when the card has no other text.
    """
    mark = "#" * level
    parts = [
        f"{mark} {facts.title}",
        _what(facts),
        f"{mark}# Source\n\n{_source(facts)}",
        f"{mark}# Proof\n\n{proof(facts)}",
        f"{mark}# Usage\n\n{_usage(facts)}",
        f"{mark}# Input\n\n{_input(facts)}",
        f"{mark}# Evaluation\n\n{_evaluation(facts)}",
        f"{mark}# Limits\n\n{_limits(facts)}",
        f"{mark}# Citation\n\n{_citation(facts)}",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _what(facts: Facts) -> str:
    lines = []
    if facts.entry:
        lines.append(f"{facts.entry.description}.")
    same = "the weights are identical" if facts.verified else "it has not been verified that they compute the same"
    source = f"{facts.trainer}'s {code(facts.record.architecture.fairseq)}"
    lines.append(
        f"This is a direct state_dict transfer from {facts.trainer} to Hugging Face, of {source} to `{facts.class_name}`: {same}."
    )
    if facts.base_model:
        address = f"https://huggingface.co/{quote(facts.base_model)}"
        lines.append(f"It was fine-tuned from [{text(facts.base_model)}]({address}).")
    section = " ".join(lines)
    for paper in facts.papers:
        links = [f"[paper](https://arxiv.org/abs/{paper.arxiv})"]
        links += [f"[{name}]({link})" for name, link in (("blog", paper.blog), ("original", paper.code)) if link]
        section += f"\n\n**{paper.title}** ({', '.join(paper.authors)}, {paper.year}): {', '.join(links)}.\n"
        section += "".join(f"\n- {fact}" for fact in paper.facts)
    if any(paper.facts for paper in facts.papers):
        section += (
            "\n\nThe papers' figures are those of their best systems, with a language model; none was measured here."
        )
    return section


def _source(facts: Facts) -> str:
    record = facts.record
    source = record.source
    address = facts.entry.address if facts.entry else None
    name = f"[{address.rsplit('/', 1)[-1]}]({address})" if address else code(facts.checkpoint)
    count = f", {size(source.size)}" if source.size else ""
    fetched = f", fetched from {code(source.address)}" if source.address and source.address != address else ""
    lines = [f"- Checkpoint: {name}{count}, sha256 {code(source.sha256)}{fetched}"]
    lines += _place(source)
    if record.base:
        kept = "" if record.base.whole else " of the pretrained model"
        name = f"{code(record.base.name)}, " if facts.compared("base.name") else ""
        lines.append(
            f"- Settings{kept}: from {name}sha256 {code(record.base.sha256)}; the checkpoint has none. "
            f"The geometry was checked against the tensors' shapes, which do not show {UNSEEN}"
        )
    trainer = f"[{facts.trainer}](https://github.com/{facts.project})"
    lines.append(f"- Trained with {trainer}; converted by {facts.tool}: {code(_command(facts))}")
    groups: dict[str, Sequence[Dropped | Filled | Edited]] = {
        "Left out": record.drops,
        "Filled in": record.fills,
        "Changed": record.edits,
    }
    for (title, rows), key in zip(groups.items(), ("drops", "fills", "edits"), strict=True):
        for reason in sorted({row.reason for row in rows}):
            names = ", ".join(code(name) for name in fold(row.key for row in rows if row.reason == reason))
            lines.append(f"- {title}: {names}" + (f": {text(reason)}" if facts.compared(key) else ""))
    settings = [f"| {code(key)} | {code(value)} |" for key, value in _settings(record.settings)]
    return "\n".join(lines + (["", "| fairseq setting | value |", "| --- | --- |", *settings] if settings else []))


def _place(source: Source) -> list[str]:
    """Say where the model is in its file, if that is not where fairseq's trainer puts it."""
    parts = (
        [f"in {code(source.where)}" if source.where else "at the top of the file"] if source.where != "model" else []
    )
    parts += [f"under the prefix {code(source.prefix)}"] if source.prefix else []
    return [f"- The model is {', '.join(parts)}"] if parts else []


def _command(facts: Facts) -> str:
    record = facts.record
    checkpoint = record.source.catalogue or record.source.address or facts.checkpoint
    words = ["fairseq-to-hf convert", quoted(checkpoint), facts.repo_id.split("/")[-1]]
    if record.base:
        words += ["--base", quoted(record.base.name if facts.compared("base.name") else "BASE")]
    asked = record.asked
    flags = {"--keep-final-proj": asked.keep_final_proj, "--ema": asked.ema, "--normalize": asked.normalize}
    flags["--no-normalize"] = asked.normalize is False
    given = {"--head": asked.head, "--lang": asked.language, "--post-process": asked.post_process, "--arch": asked.arch}
    given["--data-config"] = "config.yaml" if asked.data_config else ""
    words += [flag for flag, wanted in flags.items() if wanted]
    words += [word for option, value in given.items() if value for word in (option, quoted(value))]
    return " ".join(words)


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    inner = settings["model"].get("w2v_args")
    inner = inner["model"] if isinstance(inner, dict) else {}
    found = []
    for part, key in _SETTINGS:
        value = settings[part].get(key, inner.get(key) if part == "model" else None)
        if value is not None and not private(str(value)):
            found.append((f"{part}.{key}", str(value)))
    return found


def _usage(facts: Facts) -> str:
    needs = "transformers torch soundfile"
    needs += " datasets" if "datasets" in snippets.usage(facts) else ""
    section = f"`pip install {needs}`, then:\n\n```python\n{snippets.usage(facts)}```"
    if facts.output == "hidden":
        section += "\n\nThe model has no vocabulary: its output is hidden states, not text."
    kept = facts.record.sidecars.get("final_proj.safetensors")
    if kept:
        section += "\n\nThe pretraining head, which transformers' class lacks, is in `final_proj.safetensors`"
        joined = facts.joined and facts.output == "hidden" and "final_proj.weight" in kept.tensors
        section += f":\n\n```python\n{snippets.final_proj(facts)}```" if joined else ", under fairseq's names."
    if facts.languages:
        several = f"{len(facts.languages)} languages, each with an adapter and a vocabulary of its own"
        section += (
            f"\n\nThe model has {several}: {', '.join(map(code, facts.languages))}. "
            f"By default its language is {code(facts.record.language)}. To change the language of "
            "a loaded model: `processor.tokenizer.set_target_lang(name)` and `model.load_adapter(name)`."
        )
    return section


def _input(facts: Facts) -> str:
    features = facts.features
    hertz = features.sampling_rate if features else 16000
    lines = [f"- One channel of {hertz / 1000:g} kHz audio; another sampling rate gives wrong results. Resample first."]
    if features and features.do_normalize:
        lines.append(
            "- Each waveform is brought to zero mean and unit variance (`do_normalize`), by the processor. On quiet audio "
            "this is not what fairseq does: transformers adds 1e-7 to the variance, fairseq 1e-5. At -40 dBFS fairseq's "
            "result has 0.953 of transformers' amplitude, at -50 dBFS 0.69, so the two may transcribe it differently; "
            "louder speech is not affected."
        )
    elif features and features.num_mel_bins:
        lines.append(
            f"- The feature extractor makes {features.num_mel_bins} log-mel features of every 10 ms, normalised "
            "over the utterance as `do_ceptral_normalize` says. Silence has a deviation of 0, by which transformers divides "
            "(fairseq takes 1e-5 at least): leave it out. With torchaudio installed the features are fairseq's, without it "
            "they differ by about 1e-4."
        )
    elif features:
        lines.append(
            "- The waveform is not normalised (`do_normalize` is false), as in training: samples from -1 to 1."
        )
    if features and features.return_attention_mask:
        lines.append(
            "- In a padded batch, pass on the processor's `attention_mask`: fairseq always masks padding, and without the "
            "mask shorter utterances give other results."
        )
    elif features:
        lines.append("- The processor returns no `attention_mask`; run utterances of different lengths one by one.")
    if facts.family and facts.family.splits_masks:
        lines.append(
            "- In a padded batch, fairseq and transformers count the valid frames of the shorter utterances differently "
            "(fairseq splits the mask evenly, transformers follows the convolutions), so that the last frame of one may "
            "belong to the padding on one side. Single utterances are not affected." + _measured_padding(facts)
        )
    return "\n".join(lines)


def _measured_padding(facts: Facts) -> str:
    """Say what the verification measured of a padded batch whose frames are counted otherwise."""
    rows = facts.verification.padding if facts.verification else ()
    if not rows:
        return ""
    return (
        f" Measured on {text(padding_text(asdict(rows[0])).removeprefix('padded batches: '))}. With an `attention_mask` that has as many "
        "ones as it takes samples for fairseq's frames, transformers computes what fairseq does; that was verified too."
    )


def _evaluation(facts: Facts) -> str:
    if not facts.text:
        return "The model writes no text, so there is no word error rate to measure."
    parts = []
    if facts.evaluation:
        head = ["data", "WER %", "CER %", "utterances", "decoder", "normaliser"]
        parts.append(table([head, *map(_result, facts.evaluation)]))
        commands = [command for command in dict.fromkeys(row.command for row in facts.evaluation) if _is_plain(command)]
        parts += ["Measured with:\n\n```sh\n" + "\n".join(commands) + "\n```"] if commands else []
    else:
        parts.append("No evaluation of this model has been made: its word error rate is not known.")
        if not snippets.librispeech(facts):
            parts.append("To measure it: `fairseq-to-hf evaluate MODEL_DIR --manifest test.tsv`.")
    if snippets.librispeech(facts):
        tests = "LibriSpeech's `clean` and `other` test sets"
        done = {row.dataset.config for row in facts.evaluation}
        if not {"clean", "other"} <= done:
            parts.append(f"On {tests}:\n\n| clean | other |\n| --- | --- |\n| not measured | not measured |")
        how = f"This measures it on {tests}, greedy decoding, no language model, no text normalisation"
        parts.append(f"{how} (`pip install jiwer` as well):\n\n```python\n{snippets.evaluation(facts)}```")
    return "\n\n".join(parts)


def _is_plain(command: str | None) -> TypeGuard[str]:
    """Whether a command line can stand in a block of code, and end neither the block nor the section."""
    return bool(command) and str(command).isprintable() and not {"`", "<", "~"} & {*str(command)}


def _result(row: Result) -> list[str]:
    data = row.dataset
    name = text(", ".join(part for part in (data.name, data.config, data.split) if part) or data.type)
    name += f" at {code(data.revision.removeprefix('sha256:')[:12])}" if data.revision else ""
    rates = [f"{100 * row.metrics[kind]:.2f}" if kind in row.metrics else "" for kind in ("wer", "cer")]
    utterances = "" if row.utterances is None else str(row.utterances)
    return [name, *rates, utterances, text(row.decoder), text(row.normalizer)]


def _limits(facts: Facts) -> str:
    lines = ["- It inherits every weakness and bias of the checkpoint; the conversion adds and removes none."]
    if facts.text:
        lines.append(
            "- It writes only what its vocabulary holds, and its decoding here is greedy, without a language model."
        )
    if facts.entry is None:
        lines.append("- What it was trained on is known only as far as this card says.")
    environment = facts.verification.environment if facts.verification else {}
    if "transformers" in environment:
        lines.append(
            "- The proof holds for the versions it names; bit-identity depends on processor and thread count too."
        )
    if environment.get("attention") == "eager":
        lines.append(
            '- Bit-identity is that of `attn_implementation="eager"`; the attention that transformers 5 chooses itself '
            "(`sdpa`) computes in another order, and is the same within rounding."
        )
    return "\n".join(lines)


def _citation(facts: Facts) -> str:
    return "\n\n".join(f"```bibtex\n{_bibtex(paper)}\n```" for paper in facts.papers) or "No publication is known."


def _bibtex(paper: Paper) -> str:
    key = paper.authors[0].split()[-1].lower() + str(paper.year) + "-" + paper.arxiv
    return (
        f"@article{{{key},\n  title = {{{paper.title}}},\n  author = {{{' and '.join(paper.authors)}}},\n"
        f"  year = {{{paper.year}}},\n  eprint = {{{paper.arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
    )
