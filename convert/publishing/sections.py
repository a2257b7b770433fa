"""The card's text, section by section, each written from the facts and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from convert.publishing import snippets
from convert.publishing.facts import Facts, Paper
from convert.publishing.files import private
from convert.publishing.proof import proof
from convert.report import fold, size
from convert.verification.report import padding_text

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
_TRAINERS = {"fairseq": "https://github.com/facebookresearch/fairseq", "unilm": "https://github.com/microsoft/unilm"}


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
    source = f"{facts.trainer}'s `{facts.conversion.get('architecture', {}).get('fairseq', 'model')}`"
    lines.append(
        f"This is a direct state_dict transfer from {facts.trainer} to Hugging Face, of {source} to `{facts.class_name}`: {same}."
    )
    if facts.base_model:
        lines.append(f"It was fine-tuned from [{facts.base_model}](https://huggingface.co/{facts.base_model}).")
    text = " ".join(lines)
    for paper in facts.papers:
        links = [f"[paper](https://arxiv.org/abs/{paper.arxiv})"]
        links += [f"[{name}]({link})" for name, link in (("blog", paper.blog), ("original", paper.code)) if link]
        text += f"\n\n**{paper.title}** ({', '.join(paper.authors)}, {paper.year}): {', '.join(links)}.\n"
        text += "".join(f"\n- {fact}" for fact in paper.facts)
    if any(paper.facts for paper in facts.papers):
        text += (
            "\n\nThe papers' figures are those of their best systems, with a language model; none was measured here."
        )
    return text


def _source(facts: Facts) -> str:
    source = facts.conversion.get("source") or {}
    tool = facts.conversion.get("tool") or {}
    address = facts.entry.address if facts.entry else None
    file = re.sub(r"[^\w.+-]", "_", str(source.get("name")))  # a file's name may hold anything, Markdown too
    name = f"[{address.rsplit('/', 1)[-1]}]({address})" if address else f"`{file}`"
    count = f", {size(int(source['size']))}" if source.get("size") else ""
    lines = [
        f"- Checkpoint: {name}{count}, sha256 `{source.get('sha256')}`",
        f"- Trained with [{facts.trainer}]({_TRAINERS[facts.trainer]}); converted by {tool.get('name')} {tool.get('version')}: "
        f"`{tool.get('name')} convert {file} {facts.repo_id.split('/')[-1]}`",
    ]
    for title, key in (("Left out", "drops"), ("Filled in", "fills"), ("Changed", "edits")):
        rows: Sequence[Mapping[str, Any]] = facts.conversion.get(key) or ()
        reasons = sorted({str(row.get("reason")) for row in rows})
        lines += [f"- {title}: {_tensors(rows, reason)}: {reason}" for reason in reasons]
    settings = _settings(facts.conversion.get("settings") or {})
    table = "\n".join(f"| `{key}` | `{value}` |" for key, value in settings)
    return "\n".join(lines) + (f"\n\n| fairseq setting | value |\n| --- | --- |\n{table}" if table else "")


def _tensors(rows: Sequence[Mapping[str, Any]], reason: str) -> str:
    names = fold(str(row.get("key")) for row in rows if str(row.get("reason")) == reason)
    return ", ".join(f"`{name}`" for name in names)


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = settings.get("model") or {}
    inner = model.get("w2v_args")
    inner = inner.get("model", inner) if isinstance(inner, Mapping) else {}
    found = []
    for part, key in _SETTINGS:
        values = settings.get(part) or {}
        value = values.get(key, inner.get(key) if part == "model" else None)
        text = str(value).replace("|", "\\|")
        if value is not None and not private(text):
            found.append((f"{part}.{key}", text))
    return found


def _usage(facts: Facts) -> str:
    needs = "transformers torch soundfile"
    needs += " datasets" if "datasets" in snippets.usage(facts) else ""
    text = f"`pip install {needs}`, then:\n\n```python\n{snippets.usage(facts)}```"
    if facts.output == "hidden":
        text += "\n\nThe model has no vocabulary: it gives hidden states, no text."
    kept = (facts.conversion.get("sidecars") or {}).get("final_proj.safetensors") or {}
    if kept:
        text += (
            "\n\nThe head of pretraining, for which transformers' class has no place, is in `final_proj.safetensors`"
        )
        joined = facts.class_name == "HubertModel" and "final_proj.weight" in (kept.get("tensors") or {})
        text += f":\n\n```python\n{snippets.final_proj(facts)}```" if joined else ", under fairseq's names."
    if facts.languages:
        several = f"{len(facts.languages)} languages, each with an adapter and a vocabulary of its own"
        spoken = facts.conversion.get("language")
        text += (
            f"\n\nThe model knows {several}: {', '.join(f'`{name}`' for name in facts.languages)}. "
            f"Without being asked it speaks `{spoken}`. To change the language of "
            "a loaded model: `processor.tokenizer.set_target_lang(name)` and `model.load_adapter(name)`."
        )
    return text


def _input(facts: Facts) -> str:
    hertz = facts.preprocessor.get("sampling_rate", 16000)
    lines = [f"- One channel of {hertz / 1000:g} kHz audio; another sampling rate gives wrong results. Resample first."]
    if facts.preprocessor.get("do_normalize"):
        lines.append(
            "- Each waveform is brought to zero mean and unit variance (`do_normalize`), by the processor. On quiet audio "
            "this is not what fairseq does: transformers adds 1e-7 to the variance, fairseq 1e-5. At -40 dBFS fairseq's "
            "result has 0.953 of transformers' amplitude, at -50 dBFS 0.69, so that both may write different text there; "
            "louder speech is not affected."
        )
    elif "num_mel_bins" in facts.preprocessor:
        lines.append(
            f"- The feature extractor makes {facts.preprocessor['num_mel_bins']} log-mel features of every 10 ms, normalised "
            "over the utterance as `do_ceptral_normalize` says. Silence has a deviation of 0, by which transformers divides "
            "(fairseq takes 1e-5 at least): leave it out. With torchaudio installed the features are fairseq's, without it "
            "they differ by about 1e-4."
        )
    elif facts.preprocessor:
        lines.append(
            "- The waveform is not normalised (`do_normalize` is false), as in training: samples from -1 to 1."
        )
    if facts.preprocessor.get("return_attention_mask"):
        lines.append(
            "- In a padded batch, pass the processor's `attention_mask` on: fairseq masks padding always, and without the "
            "mask shorter utterances come out differently."
        )
    elif facts.preprocessor:
        lines.append("- The processor returns no `attention_mask`; run utterances of different lengths one by one.")
    if facts.class_name.startswith(("Hubert", "WavLM")):
        lines.append(
            "- In a padded batch, fairseq and transformers count the valid frames of the shorter utterances differently "
            "(fairseq splits the mask evenly, transformers follows the convolutions), so that the last frame of one may "
            "belong to the padding on one side. Single utterances are not affected." + _measured_padding(facts)
        )
    return "\n".join(lines)


def _measured_padding(facts: Facts) -> str:
    """Say what the verification measured of a padded batch whose frames are counted otherwise."""
    rows: Sequence[Mapping[str, Any]] = (facts.verification or {}).get("padding") or ()
    if not rows:
        return ""
    return (
        f" Measured on {padding_text(rows[0]).removeprefix('padded batches: ')}. With an `attention_mask` that has as many "
        "ones as it takes samples for fairseq's frames, transformers computes what fairseq does; that was verified, too."
    )


def _evaluation(facts: Facts) -> str:
    if not facts.text:
        return "The model writes no text, so that there is no word error rate to measure."
    parts = []
    if facts.evaluation:
        rows = "\n".join(_result(row) for row in facts.evaluation)
        parts.append(f"| data | WER % | CER % | utterances | decoder | normaliser |\n|{' --- |' * 6}\n{rows}")
        commands = dict.fromkeys(str(row["command"]) for row in facts.evaluation if row.get("command"))
        parts += ["Measured with:\n\n```sh\n" + "\n".join(commands) + "\n```"] if commands else []
    else:
        parts.append("No evaluation of this model has been made: its word error rate is not known.")
        if not snippets.librispeech(facts):
            parts.append("To measure it: `fairseq-to-hf evaluate MODEL_DIR --manifest test.tsv`.")
    if snippets.librispeech(facts):
        tests = "LibriSpeech's `clean` and `other` test sets"
        done = {str((row.get("dataset") or {}).get("config")) for row in facts.evaluation}
        if not {"clean", "other"} <= done:
            parts.append(f"On {tests}:\n\n| clean | other |\n| --- | --- |\n| not measured | not measured |")
        text = f"This measures it on {tests}, greedy decoding, no language model, no text normalisation"
        parts.append(f"{text} (`pip install jiwer` as well):\n\n```python\n{snippets.evaluation(facts)}```")
    return "\n\n".join(parts)


def _result(row: Mapping[str, Any]) -> str:
    data = row["dataset"]
    name = ", ".join(str(data[key]) for key in ("name", "config", "split") if data.get(key)) or str(data["type"])
    revision = f" at `{str(data['revision']).removeprefix('sha256:')[:12]}`" if data.get("revision") else ""
    rates = [f"{100 * row['metrics'][kind]:.2f}" if kind in row["metrics"] else "" for kind in ("wer", "cer")]
    cells = [
        name + revision,
        *rates,
        str(row.get("utterances", "")),
        str(row.get("decoder")),
        str(row.get("normalizer")),
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _limits(facts: Facts) -> str:
    lines = ["- It inherits every weakness and bias of the checkpoint; the conversion adds and removes none."]
    if facts.text:
        lines.append(
            "- It writes only what its vocabulary holds, and its decoding here is greedy, without a language model."
        )
    if facts.entry is None:
        lines.append("- What it was trained on is known only as far as this card says it.")
    environment = (facts.verification or {}).get("environment") or {}
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
