"""The Python that a card shows; tests run every line of it as it stands."""

from __future__ import annotations

import json

from convert.publishing.facts import Facts

_PROCESSOR = "processor = AutoProcessor.from_pretrained(repository, revision=revision{language})\n"
_FEATURES = "features = AutoFeatureExtractor.from_pretrained(repository, revision=revision)\n"
_TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision)\n"

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
from transformers import {classes}

{load}
speech, rate = soundfile.read("speech.wav", dtype="float32")  # {hertz} Hz, one channel
{use}
"""

# what a model gives -> the classes that prepare its input and read its output, how they are loaded, how they are used
_USES = {
    "ctc": (
        "AutoProcessor",
        _PROCESSOR,
        """\
inputs = processor(speech, sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
print(processor.batch_decode(outputs.logits.argmax(dim=-1))[0])
""",
    ),
    "generation": (
        "AutoFeatureExtractor, AutoTokenizer",
        _FEATURES + _TOKENIZER,
        """\
inputs = features(speech, sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
    tokens = model.generate(**inputs)
print(tokenizer.batch_decode(tokens, skip_special_tokens=True)[0])
""",
    ),
    "labels": (
        "AutoFeatureExtractor",
        _FEATURES,
        """\
inputs = features(speech, sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
    shares = model(**inputs).logits.softmax(dim=-1)[0]
print(model.config.id2label[int(shares.argmax())], float(shares.max()))
""",
    ),
    "hidden": (
        "AutoFeatureExtractor",
        _FEATURES,
        """\
inputs = features(speech, sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
print({name: tuple(value.shape) for name, value in outputs.items() if torch.is_tensor(value)})
""",
    ),
}

_FINAL_PROJ = """\
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn
from transformers import {name}

{load}

class {name}WithFinalProj({name}):
    def __init__(self, config):
        super().__init__(config)
        self.final_proj = nn.Linear(config.hidden_size, config.classifier_proj_size)


head = load_file(hf_hub_download(repository, "final_proj.safetensors", revision=revision))
model = {name}WithFinalProj.from_pretrained(repository, revision=revision).eval()
model.final_proj.load_state_dict({{"weight": head["final_proj.weight"], "bias": head["final_proj.bias"]}})
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
    classes, load, use = _USES[facts.output]
    hertz = facts.features.sampling_rate if facts.features else 16000
    classes = f"{classes}, {facts.class_name}"
    return _OWN_FILE.format(classes=classes, load=_load(facts, load), use=use.rstrip("\n"), hertz=hertz)


def final_proj(facts: Facts) -> str:
    """Return the snippet that joins a model and the head that its class has no place for."""
    return _FINAL_PROJ.format(name=facts.class_name, load=_pin(facts))


def evaluation(facts: Facts) -> str:
    """Return the snippet that measures the word error rate on LibriSpeech's two test sets."""
    return _LIBRISPEECH.format(name=facts.class_name, load=_load(facts))


def _load(facts: Facts, parts: str = _PROCESSOR) -> str:
    language = f', target_lang="{facts.languages[0]}"' if facts.languages else ""
    # every language has a vocabulary of its own size
    sizes = ", ignore_mismatched_sizes=True" if language else ""
    model = f"model = {facts.class_name}.from_pretrained(repository, revision=revision{language}{sizes}).eval()\n"
    return _pin(facts) + parts.format(language=language) + model


def _pin(facts: Facts) -> str:
    remark = "  # exactly the files this card names" if facts.pin else "  # pin the commit that you have checked"
    return f'repository = "{facts.repo_id}"\nrevision = {json.dumps(facts.pin or "main")}{remark}\n'
