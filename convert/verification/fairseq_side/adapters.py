"""Adapters: stacked ones, and the languages of MMS."""

from __future__ import annotations

import torch

from .reference import Reference


class AdaptedReference(Reference):
    """A model that may have a language's adapters and head."""

    current = ""

    def set_language(self, language: str) -> None:
        """Take another of the stacked adapters; or, in files of MMS, the tensors of the language instead of the model's own.

        The latter is what `examples/speech_recognition/new/infer.py` does.
        """
        language = language or self.request.get("language", "")
        if language == self.current:
            return
        self.current = language
        if language not in self.request["groups"]:
            self.row = self.request["languages"].get(language, 0)
            return
        group = self.request["groups"][language]
        weights = self.weights.read(group["tensors"])
        self.request = dict(self.request, symbols=group["symbols"])
        self.dictionary = None
        rows, width = weights["w2v_encoder.proj.weight"].shape
        self.model.w2v_encoder.proj = torch.nn.Linear(width, rows).to(self.device).requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            if name in weights:
                value = weights[name]
                if self.device.type != "cpu" or value.dtype == torch.float64:
                    value = value.float().to(self.device)
                parameter.data = value.reshape(parameter.shape)
        self._filled(weights)
