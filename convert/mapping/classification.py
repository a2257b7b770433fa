"""The head of fairseq's audio classifiers (`Wav2VecClassification` with `MeanPoolingFast`), one line a tensor."""

from __future__ import annotations

from convert.mapping.rules import Rename

# fmt: off
CLASSIFICATION_HEAD = (
    Rename("pooling_layer.linear.weight",                          "projector.weight",                                             "latent hidden"),
    Rename("pooling_layer.linear.bias",                            "projector.bias",                                               "latent"),
    Rename("pooling_layer.projection.weight",                      "classifier.weight",                                            "labels latent"),
    Rename("pooling_layer.projection.bias",                        "classifier.bias",                                              "labels"),
)
# fmt: on
