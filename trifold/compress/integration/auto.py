"""Which of transformers' auto classes builds and loads the model of a config."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """AutoModelForMultimodalLM for a model that also sees or hears, AutoModelForCausalLM for every other one.

    Some configs serve both; `architectures` says which it is.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    causal: Any = AutoModelForCausalLM._model_mapping
    multimodal: Any = AutoModelForMultimodalLM._model_mapping
    if type(config) not in multimodal:
        return AutoModelForCausalLM
    named = multimodal[type(config)].__name__ in (config.architectures or ())
    return AutoModelForMultimodalLM if named or type(config) not in causal else AutoModelForCausalLM


def is_known(config: Any) -> bool:
    """Whether transformers has a language model for the config, and it is the one that `architectures` names."""
    mapping = auto_class(config)._model_mapping
    names = config.architectures or ()
    if type(config) not in mapping or getattr(config, "is_encoder_decoder", False):
        return False
    decoders = ("CausalLM", "LMHeadModel", mapping[type(config)].__name__)
    return not names or names[0].endswith(decoders)
