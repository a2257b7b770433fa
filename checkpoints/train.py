"""Train the small wav2vec 2.0 checkpoint that this folder ships: speech from espeak-ng, training by fairseq.

Five steps, in this order; without step names all of them run, each from what the one before left in the working folder:

    speech     speak every sentence with espeak-ng; write 16 kHz recordings, fairseq manifests and the dictionary
    pretrain   fairseq-hydra-train, wav2vec2 (self-supervised, without the transcripts)
    finetune   fairseq-hydra-train, wav2vec_ctc on letters, from the pretrained checkpoint
    measure    greedy word error rate on the held-out sentences, with fairseq's own model
    ship       copy the checkpoints, the dictionary and eight held-out recordings beside this script

Nothing is downloaded. Training runs inside the working folder with relative paths only, so that the checkpoints carry
no path of the computer they were made on. See README.md beside this script for the environment.

    python checkpoints/train.py WORK_FOLDER [speech] [pretrain] [finetune] [measure] [ship]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_RATE = 16_000
SPLITS = {"train": 720, "valid": 40, "heldout": 60}
VOICES = ("en-us", "en-us+f2", "en-us+m3", "en-gb")
SHIPPED_RECORDINGS = 8
SHIPPED_ROOT = "checkpoints/heldout"  # fairseq opens it from where it runs: the repository's root
HERE = Path(__file__).resolve().parent
# Relative to the working folder.
DATA = Path("data")
FINETUNED = Path("finetuned/checkpoint_best.pt")

# A sentence takes one word of each row. The words use all 26 letters.
SENTENCE = (
    "THE ONE EVERY THIS THAT",
    "SMALL QUIET BROWN LAZY OLD HAPPY YOUNG BRAVE",
    "FOX DOG BIRD CHILD KING FARMER SAILOR ZEBRA TEACHER COOK",
    "JUMPS RUNS WALKS SLEEPS WAITS SINGS LIVES PLAYS SITS VANISHES",
    "OVER UNDER NEAR BEHIND INSIDE BESIDE",
    "A HIS MY OUR THEIR",
    "GREEN WOODEN DARK COLD EMPTY LARGE STRANGE",
    "BOX HOUSE RIVER GARDEN BRIDGE FOREST KITCHEN SHIP TABLE",
    "TODAY NOW AGAIN ALONE QUICKLY",
)
OPTIONAL_ROWS = (1, 6, 8)

COMMON_SETTINGS = """
common: {{cpu: true, seed: 1, plasma_path: plasma, log_format: simple, log_interval: 20}}
hydra: {{run: {{dir: .}}, output_subdir: null}}
checkpoint:
  save_dir: {save_dir}
  no_save_optimizer_state: true
  no_epoch_checkpoints: true
distributed_training: {{distributed_world_size: 1}}
dataset: {{num_workers: 0, max_tokens: 480000, skip_invalid_size_inputs_valid_test: true}}
"""
PRETRAIN_SETTINGS = """
task: {_name: audio_pretraining, data: data, max_sample_size: 160000, min_sample_size: 8000, normalize: true}
criterion: {_name: wav2vec, infonce: true, log_keys: [prob_perplexity, code_perplexity, temp], loss_weights: [1.0, 10]}
optimization: {max_update: 900, lr: [0.0005]}
optimizer: {_name: adam, adam_betas: "(0.9,0.98)", adam_eps: 1e-06, weight_decay: 0.01}
lr_scheduler: {_name: polynomial_decay, warmup_updates: 100}
model:
  _name: wav2vec2
  quantize_targets: true
  extractor_mode: layer_norm
  layer_norm_first: true
  conv_feature_layers: "[(96, 10, 5)] + [(96, 3, 2)] * 4 + [(96, 2, 2)] * 2"
  conv_bias: true
  conv_pos: 32
  conv_pos_groups: 8
  encoder_layers: 4
  encoder_embed_dim: 128
  encoder_ffn_embed_dim: 512
  encoder_attention_heads: 4
  latent_vars: 32
  latent_dim: 64
  final_dim: 64
  latent_temp: [2.0, 0.5, 0.998]
  feature_grad_mult: 0.1
  num_negatives: 50
  mask_length: 5
  dropout: 0.0
  attention_dropout: 0.0
  dropout_input: 0.0
  dropout_features: 0.0
  encoder_layerdrop: 0.0
"""
FINETUNE_SETTINGS = """
task: {_name: audio_finetuning, data: data, labels: ltr, normalize: true}
criterion: {_name: ctc, zero_infinity: true, post_process: letter}
optimization: {max_update: 2600, lr: [0.001], sentence_avg: true}
optimizer: {_name: adam, adam_betas: "(0.9,0.98)", adam_eps: 1e-08, weight_decay: 0.01}
lr_scheduler: {_name: tri_stage, phase_ratio: [0.1, 0.5, 0.4], final_lr_scale: 0.02}
dataset: {validate_interval: 5}
checkpoint: {save_interval: 5, best_checkpoint_metric: wer}
model:
  _name: wav2vec_ctc
  w2v_path: pretrained/checkpoint_last.pt
  freeze_finetune_updates: 0
  feature_grad_mult: 1.0
  apply_mask: true
  mask_prob: 0.1
  mask_length: 4
  layerdrop: 0.0
  dropout: 0.05
  attention_dropout: 0.05
  activation_dropout: 0.05
  final_dropout: 0.05
"""


@dataclass(frozen=True, slots=True)
class Recording:
    """A spoken sentence: its file name, its length in samples, its words."""

    name: str
    samples: int
    sentence: str


def make_sentences(count: int, rng: random.Random) -> list[str]:
    """Draw distinct sentences, so that no held-out sentence was heard in training."""
    sentences: dict[str, None] = {}
    while len(sentences) < count:
        rows = [row.split() for index, row in enumerate(SENTENCE) if index not in OPTIONAL_ROWS or rng.random() < 0.5]
        sentences[" ".join(rng.choice(row) for row in rows)] = None
    return list(sentences)


def speak(sentence: str, path: Path, rng: random.Random) -> Recording:
    """Speak a sentence into a 16 kHz mono 16-bit file with a random voice, rate and pitch."""
    import soundfile
    from scipy.signal import resample_poly

    voice, rate, pitch = rng.choice(VOICES), rng.randint(140, 185), rng.randint(35, 65)
    command = ["espeak-ng", "-v", voice, "-s", str(rate), "-p", str(pitch), "-w", str(path), sentence.lower()]
    subprocess.run(command, check=True)
    samples, spoken_rate = soundfile.read(path)
    samples = resample_poly(samples, SAMPLE_RATE, spoken_rate) * 0.9  # headroom: resampling overshoots
    soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
    return Recording(path.name, len(samples), sentence)


def letters(sentence: str) -> str:
    """Spell a sentence as fairseq's letter labels: `A DOG` is `A | D O G |`."""
    return " ".join(sentence.replace(" ", "|")) + " |"


def write_split(folder: Path, split: str, root: str, recordings: Sequence[Recording]) -> None:
    """Write fairseq's manifest (`.tsv`: root, then file and samples) and its transcripts as words and as letters."""
    lines = {
        "tsv": [root, *(f"{recording.name}\t{recording.samples}" for recording in recordings)],
        "wrd": [recording.sentence for recording in recordings],
        "ltr": [letters(recording.sentence) for recording in recordings],
    }
    for suffix, rows in lines.items():
        (folder / f"{split}.{suffix}").write_text("".join(f"{row}\n" for row in rows))


def read_split(folder: Path, split: str) -> list[Recording]:
    """Read back what `write_split` wrote."""
    rows = (folder / f"{split}.tsv").read_text().splitlines()[1:]
    sentences = (folder / f"{split}.wrd").read_text().splitlines()
    pairs = ((row.split("\t"), sentence) for row, sentence in zip(rows, sentences, strict=True))
    return [Recording(name, int(samples), sentence) for (name, samples), sentence in pairs]


def make_speech() -> None:
    """Speak all sentences and write the three splits and the dictionary."""
    rng = random.Random(1)
    sentences = iter(make_sentences(sum(SPLITS.values()), rng))
    for split, count in SPLITS.items():
        folder = DATA / split
        folder.mkdir(parents=True, exist_ok=True)
        recordings = [speak(next(sentences), folder / f"{split}-{index:03d}.wav", rng) for index in range(count)]
        write_split(DATA, split, folder.as_posix(), recordings)
        minutes = sum(recording.samples for recording in recordings) / SAMPLE_RATE / 60
        print(f"{split}: {count} sentences, {minutes:.1f} minutes")
    counts = Counter((DATA / "train.ltr").read_text().split())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    (DATA / "dict.ltr.txt").write_text("".join(f"{symbol} {count}\n" for symbol, count in ordered))


def train(name: str, settings: str) -> None:
    """Run fairseq-hydra-train on the settings; its checkpoints land in the folder `name`."""
    import yaml

    def merge(base: dict, other: dict) -> dict:
        nested = {key: {**base[key], **value} for key, value in other.items() if key in base}
        return {**base, **other, **nested}

    Path("config").mkdir(exist_ok=True)
    config = merge(yaml.safe_load(COMMON_SETTINGS.format(save_dir=name)), yaml.safe_load(settings))
    Path("config", f"{name}.yaml").write_text("# @package _group_\n" + yaml.safe_dump(config, sort_keys=False))
    # hydra's default log file would be written into the checkpoint with its absolute path
    command = ["--config-dir", "config", "--config-name", name, "hydra/job_logging=stdout"]
    subprocess.run([str(Path(sys.executable).with_name("fairseq-hydra-train")), *command], check=True)


def transcribe(checkpoint: Path, paths: Sequence[Path]) -> list[tuple[str, int]]:
    """Decode recordings greedily, one at a time, with fairseq's model; return each transcript and its frames."""
    import soundfile
    import torch
    from fairseq import checkpoint_utils
    from fairseq.data import Dictionary
    from fairseq.data.data_utils import post_process

    # fairseq calls torch.load without weights_only, which admits no classes since torch 2.6
    torch.serialization.add_safe_globals([Dictionary])
    (model,), settings, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    model.eval()
    dictionary = task.target_dictionary
    results = []
    for path in paths:
        samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        if settings.task.normalize:
            samples = torch.nn.functional.layer_norm(samples, samples.shape)
        with torch.no_grad():
            logits = model(source=samples[None], padding_mask=None)["encoder_out"][:, 0]
        tokens = logits.argmax(-1).unique_consecutive()
        text = dictionary.string(tokens[tokens != dictionary.bos()])  # fairseq's CTC blank is <s>
        results.append((post_process(text, "letter").strip(), len(logits)))
    return results


def word_error_rate(label: str, sentences: Sequence[str], texts: Sequence[str]) -> str:
    """Say the word error rate and what it was counted on."""
    import jiwer

    output = jiwer.process_words(list(sentences), list(texts))
    errors = output.substitutions + output.deletions + output.insertions
    words = output.hits + output.substitutions + output.deletions
    return f"{label}: WER {output.wer:.2%}, {errors} errors in {words} words, {len(sentences)} sentences"


def measure() -> None:
    """Print the word error rate on all held-out sentences and on the ones that are shipped; write which are shipped."""
    recordings = read_split(DATA, "heldout")
    results = transcribe(FINETUNED, [DATA / "heldout" / recording.name for recording in recordings])
    sentences = [recording.sentence for recording in recordings]
    texts, frames = zip(*results, strict=True)
    for sentence, text in zip(sentences, texts, strict=True):
        if sentence != text:
            print(f"expected {sentence}\nheard    {text}")
    # Half even, half odd: fairseq pads an odd number of frames, and converters must agree on both.
    half = SHIPPED_RECORDINGS // 2
    even, odd = ([index for index, count in enumerate(frames) if count % 2 == parity] for parity in (0, 1))
    shipped = sorted(even[:half] + odd[:half])
    write_split(DATA, "shipped", SHIPPED_ROOT, [recordings[index] for index in shipped])
    print(word_error_rate("held-out", sentences, texts))
    print(word_error_rate("shipped", [sentences[index] for index in shipped], [texts[index] for index in shipped]))


def ship() -> None:
    """Copy the checkpoint as fairseq wrote it, the dictionary and eight held-out recordings beside this script."""
    shutil.copyfile(FINETUNED, HERE / "espeak-wav2vec2-ctc.pt")
    shutil.copyfile(DATA / "dict.ltr.txt", HERE / "dict.ltr.txt")
    heldout = HERE / "heldout"
    heldout.mkdir(exist_ok=True)
    recordings = read_split(DATA, "shipped")
    for recording in recordings:
        shutil.copyfile(DATA / "heldout" / recording.name, heldout / recording.name)
    write_split(heldout, "heldout", SHIPPED_ROOT, recordings)


STEPS = {
    "speech": make_speech,
    "pretrain": lambda: train("pretrained", PRETRAIN_SETTINGS),
    "finetune": lambda: train("finetuned", FINETUNE_SETTINGS),
    "measure": measure,
    "ship": ship,
}


def main() -> None:
    """Run the steps named on the command line inside the working folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="working folder, made if missing")
    parser.add_argument("steps", nargs="*", metavar="step", help=f"some of {', '.join(STEPS)}; default: all")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.steps) - set(STEPS)):
        parser.error(f"unknown steps: {', '.join(unknown)}; known: {', '.join(STEPS)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.work)
    for name, step in STEPS.items():
        if not arguments.steps or name in arguments.steps:
            step()


if __name__ == "__main__":
    main()
