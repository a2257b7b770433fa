"""The head of audio classifiers (`fairseq.models.wav2vec.wav2vec2_classification`): a mean, two layers and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert.families.base import NO_HEAD, Kind, Part, Shapes, Sources
from convert.families.ctc import tuned
from convert.families.damages import Absent, Change, Converted, Damages, roll
from convert.families.settings import Reader, Value
from convert.rules import Drop, Rename

# fmt: off
HEAD = (  # MeanPoolingFast
    Rename("pooling_layer.linear.weight",                          "projector.weight",                                             "latent hidden"),
    Rename("pooling_layer.linear.bias",                            "projector.bias",                                               "latent"),
    Rename("pooling_layer.projection.weight",                      "classifier.weight",                                            "vocab latent"),
    Rename("pooling_layer.projection.bias",                        "classifier.bias",                                              "vocab"),
)
DROPS = (
    Drop("pooling_layer.linear.{p}",                NO_HEAD, optional=True),
    Drop("pooling_layer.projection.{p}",            NO_HEAD, optional=True),
    Drop("pooling_layer.weights",                   NO_HEAD, optional=True),  # LayerWeightedMeanPooling
)
# fmt: on
# setting -> what Wav2Vec2ClassificationConfig says where it is absent, the only value with an equivalent, and why
# fmt: off
POOLING = {
    "pooling":       ("first_token", "mean",   "Wav2Vec2ForSequenceClassification takes the mean over the frames"),
    "activation_fn": ("gelu",        "linear", "Wav2Vec2ForSequenceClassification has no activation between its two layers"),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Classifier(Part):
    """The geometry of the head.

    Args:
        classes: the number of labels.
        latent: the width between the two layers.
    """

    classes: int
    latent: int

    @property
    def dims(self) -> Mapping[str, int]:
        """The sizes that the head's rules name."""
        return {"vocab": self.classes, "latent": self.latent}


def _measure(shapes: Shapes) -> Classifier:
    widths = (shapes.get(f"pooling_layer.{layer}.weight", (0,))[0] for layer in ("projection", "linear"))
    return Classifier(*widths)


def _values(sources: Sources) -> list[Value]:
    """Read the labels and the width of the head; refuse a pooling that transformers does not compute."""
    outer = sources.outer
    values = [Value("final_dropout", outer.get("final_dropout", float, 0.0), outer.origin("final_dropout"))]
    if sources.head == "encoder":
        if sources.request.head != "encoder":  # the family has no such class: never lose the classifier unasked
            name = str(sources.reader.values.get("_name"))
            detail = f"no classifier on an encoder of {name} is supported; --head encoder leaves the classifier out"
            sources.refuse("unsupported-architecture", name, detail)
        return values
    for name, (default, known, why) in POOLING.items():
        if outer.get(name, str, default) != known:
            detail = (
                f"the pooling's is {outer.values.get(name, default)!r}: {why}; --head encoder leaves the pooling out"
            )
            sources.refuse("unsupported-setting", name, detail)
    labels = sources.dictionary.symbols if sources.dictionary else ()
    repeated = sorted(label for label, count in Counter(labels).items() if count > 1)
    if repeated:
        sources.refuse("bad-dictionary", "dictionary", f"duplicate labels: {repeated[:5]}")
    hidden = sources.reader.get("encoder_embed_dim", int)
    width = outer.get("latent_embed_dim", int, 0) or hidden
    linear = sources.checkpoint.inventory.get("pooling_layer.linear.weight")
    if linear and linear.shape != (width, hidden):
        detail = f"source {linear.shape}, the settings say {(width, hidden)}"
        sources.refuse("shape", "pooling_layer.linear.weight", detail)
    return [
        *values,
        Value("classifier_proj_size", width, f"{outer.origin('latent_embed_dim')}, else encoder_embed_dim"),
        Value("id2label", {str(index): label for index, label in enumerate(labels)}, "dictionary"),
        Value("label2id", {label: index for index, label in enumerate(labels)}, "dictionary"),
        Value("use_weighted_layer_sum", False, "MeanPoolingFast takes the last layer"),
    ]


def _from_config(config: Reader) -> dict[str, dict[str, Any]]:
    pooling = {name: known for name, (_, known, _) in POOLING.items()}
    own = tuned(config) | pooling | {"latent_embed_dim": config.count("classifier_proj_size", 256)}
    return {"model": own, "criterion": {"_name": "cross_entropy"}, "task": {"labels": "lbl"}}


def _damages(model: Converted) -> Damages:
    if "classifier.weight" not in model.weights:
        return {}
    several = model.base.config.num_labels > 1
    return {
        "a bias of the projector changed": Change("projector.bias", lambda value: value.add_(1.0)),
        "the classes moved by one": Change("classifier.weight", roll) if several else Absent("the model has one class"),
    }


CLASSIFICATION = Kind(
    name="classification",
    rules=HEAD,
    drops=DROPS,
    mark=r"^pooling_layer\.",
    ranks={"pooling_layer.linear.weight": 2, "pooling_layer.projection.weight": 2},
    measure=_measure,
    nested=True,
    read=frozenset({"activation_fn", "apply_mask", "final_dropout", "latent_embed_dim", "normalize", "pooling"}),
    symbols="pooling_layer.projection.weight",
    text=False,
    task="audio_classification",
    values=_values,
    from_config=_from_config,
    damages=_damages,
)
