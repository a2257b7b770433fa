"""XLSR-53 and XLS-R: wav2vec 2.0 models whose tasks no released fairseq knows, and whose heads are 80 and 120 wide."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq_models import LARGE, Variant, build, save
from verify_models import few_inputs, short_inputs

import convert
from convert.verification import verify

torch.serialization.add_safe_globals([Dictionary])  # fairseq's loader leaves torch.load at its default, weights only
# As the released files have them, but for the sizes. Two heads of the released width.
RELEASED = LARGE | {"encoder_layers": 2, "encoder_attention_heads": 2, "conv_pos": 128, "conv_pos_groups": 16}
RELEASED |= {"latent_vars": 20, "latent_dim": 0, "num_negatives": 100, "logit_temp": 0.1}
SIZES: dict[str, dict[str, Any]] = {
    "xlsr-53": RELEASED | {"encoder_embed_dim": 128, "final_dim": 768},
    "xls-r-300m": RELEASED | {"encoder_embed_dim": 128, "final_dim": 768},
    "xls-r-1b": RELEASED | {"encoder_embed_dim": 160, "final_dim": 1024},
    "xls-r-2b": RELEASED | {"encoder_embed_dim": 240, "final_dim": 1024},
}
# Fields of the tasks that these were trained with, in fairseq branches that were never released
TASK = {"_name": "temp_sampled_audio_pretraining", "sampling_alpha": 0.5, "multiple_train_files": True}
TASK |= {"shuffle_by_bucket": True, "shuffle_by_bucket_size": 128, "train_subset": "train", "mask_prob": 0.65}
TASK |= {"eval_wer": False, "eval_wer_config": {"beam": 5, "print_alignment": "hard"}, "encoder_embed_dim": 1024}


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with short_inputs(), few_inputs("speech-even", "shortest", "quiet"):
        yield


def released(kind: str, size: str, path: Path) -> tuple[torch.nn.Module, Path]:
    """Save a real fairseq model of a release's settings, under that release's task."""
    variant = Variant(kind, SIZES[size], normalize=True)
    model = build(variant)
    save(variant, path, model=model)
    state = torch.load(path, weights_only=False)
    pretrained = state["cfg"] if kind == "pretraining" else state["cfg"]["model"]["w2v_args"]
    pretrained["task"] |= TASK
    torch.save(state, path)
    return model, path


@pytest.mark.parametrize(
    ("kind", "size"),
    [("pretraining", "xls-r-300m"), ("pretraining", "xls-r-1b"), ("ctc", "xls-r-1b"), ("ctc", "xls-r-2b")],
)
def test_a_task_that_fairseq_does_not_know(kind: str, size: str, tmp_path: Path) -> None:
    """fairseq's own loader refuses the file; the conversion is proved, and what `restore` writes is taken."""
    model, path = released(kind, size, tmp_path / "model.pt")
    with pytest.raises(Exception, match="Could not infer task type"):
        checkpoint_utils.load_model_ensemble_and_task([str(path)])
    done = convert.convert(path, tmp_path / "out")
    values = {value.name: value.value for value in done.model.config}
    assert values["hidden_size"] // values["num_attention_heads"] == SIZES[size]["encoder_embed_dim"] // 2
    assert values["do_stable_layer_norm"] and values["feat_extract_norm"] == "layer" and values["conv_bias"]
    proof = verify(path, tmp_path / "out", devices=["cpu"], write=False)
    assert proof.problems == ()
    assert {run["verdict"] for run in proof.report["runs"] if run["require"] == "identical"} == {"identical"}
    assert all(control["caught"] for control in proof.report["controls"])
    convert.restore(tmp_path / "out", tmp_path / "back.pt")
    (restored,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "back.pt")])
    before, after = model.state_dict(), restored.state_dict()
    assert before.keys() == after.keys()
    assert all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in before)


def test_the_layout_of_xlsr_53(tmp_path: Path) -> None:
    """Its settings are one flat Namespace, in which lists are texts, and no dictionary stands in it."""
    variant = Variant("pretraining", SIZES["xlsr-53"], normalize=True)
    path = save(variant, tmp_path / "xlsr_53_56k.pt", layout="namespace")
    state = torch.load(path, weights_only=False)
    arguments = vars(state["args"]) | {"loss_weights": "[0.2, 0]", "log_keys": '["prob_perplexity"]'}
    arguments |= {"latent_temp": "(2.0, 0.1, 0.999995)", "lr_scheduler": "polynomial_decay", "train_subset": "train"}
    torch.save(state | {"args": Namespace(**arguments)}, path)
    done = convert.convert(path, tmp_path / "out")
    values = {value.name: value.value for value in done.model.config}
    assert values["diversity_loss_weight"] == 0.2
    assert values["proj_codevector_dim"] == values["codevector_dim"] == 768
    assert done.model.processor.files["preprocessor_config.json"]["do_normalize"] is True
    proof = verify(path, tmp_path / "out", devices=["cpu"], write=False)
    assert proof.problems == ()
    assert {run["verdict"] for run in proof.report["runs"] if run["require"] == "identical"} == {"identical"}
