"""What fairseq's audio classifiers (`Wav2VecClassification`) add to their encoder: a pooling, two layers and labels."""

from __future__ import annotations

from collections import Counter

from convert.model.encoder import Kind, Sources
from convert.model.types import Value

# setting -> what Wav2Vec2ClassificationConfig says where it is absent, the only value with a twin, and why
# fmt: off
POOLING = {
    "pooling":       ("first_token", "mean",   "Wav2Vec2ForSequenceClassification takes the mean over the frames"),
    "activation_fn": ("gelu",        "linear", "Wav2Vec2ForSequenceClassification has no activation between its two layers"),
}
# fmt: on


def classification_values(sources: Sources) -> list[Value]:
    """Read the labels and the width of the head; refuse a pooling that transformers does not compute."""
    outer = sources.outer
    values = [Value("final_dropout", outer.get("final_dropout", float, 0.0), outer.origin("final_dropout"))]
    if sources.head == "encoder":
        if sources.request.head != "encoder":  # the family has no such class: never lose the classifier unasked
            name = str(sources.reader.values.get("_name"))
            detail = f"no classifier on an encoder of {name} is supported; --head encoder leaves the classifier out"
            sources.refuse("unsupported-architecture", name, detail)
        return values
    for name, (default, twin, why) in POOLING.items():
        if outer.get(name, str, default) != twin:
            detail = (
                f"the pooling's is {outer.values.get(name, default)!r}: {why}; --head encoder leaves the pooling out"
            )
            sources.refuse("unsupported-setting", name, detail)
    labels = sources.dictionary.symbols if sources.dictionary else ()
    repeated = sorted(label for label, count in Counter(labels).items() if count > 1)
    if repeated:
        sources.refuse("bad-dictionary", "dictionary", f"labels stand there twice: {repeated[:5]}")
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


CLASSIFICATION = Kind(
    name="classification",
    nested=True,
    read=frozenset({"activation_fn", "apply_mask", "final_dropout", "latent_embed_dim", "normalize", "pooling"}),
    symbols="pooling_layer.projection.weight",
    text=False,
    values=classification_values,
)
