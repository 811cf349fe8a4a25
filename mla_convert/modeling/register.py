"""Makes converted models known to transformers' Auto classes, so that they load without remote code.

Each becomes known when it is first asked for: its class is made from the stock one, whose module is imported for that.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import transformers

from mla_convert.modeling.configuration_mla import MODEL_TYPE, config_class, is_whole
from mla_convert.source.families import FAMILIES, WHOLES, is_installed


class _OnDemand(MutableMapping[Any, Any]):
    """What was registered with an Auto class, and the converted models, each made when it is asked for."""

    def __init__(
        self, registered: dict[Any, Any], make: Callable[[Any], Any], keys: Callable[[], Iterable[Any]]
    ) -> None:
        """Take over what is registered.

        Args:
            registered: entries of the Auto class so far.
            make: gives the value of a key; None: there is no such entry.
            keys: gives the keys of all converted models.
        """
        self._made, self._make, self._all = dict(registered), make, keys

    def __getitem__(self, key: Any) -> Any:
        if key not in self._made:
            made = self._make(key)
            if made is None:
                raise KeyError(key)
            self._made.setdefault(key, made)
        return self._made[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._made[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._made[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(dict.fromkeys([*self._made, *self._all()]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _config(model_type: Any) -> type | None:
    """The configuration class of a converted model's `model_type`; None for any other."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if not isinstance(model_type, str) or not model_type.startswith(MODEL_TYPE):
        return None
    stock = model_type.removeprefix(MODEL_TYPE)
    if stock in WHOLES or (stock in FAMILIES and is_installed(stock)):
        return config_class(getattr(transformers, CONFIG_MAPPING_NAMES[stock]))
    return None


def _model(config: Any) -> type | None:
    """The model class of a converted model's configuration class; None for any other."""
    from transformers.models.auto import modeling_auto as auto

    if getattr(config, "__module__", None) != config_class.__module__ or _config(config.model_type) is not config:
        return None
    from mla_convert.modeling.modeling_mla import model_class

    names = (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if is_whole(config) else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    return model_class(getattr(transformers, names[config.model_type.removeprefix(MODEL_TYPE)]))


def _whole_model(config: Any) -> type | None:
    """`_model` of a multimodal model; None for any other."""
    model = _model(config)
    return model if model and is_whole(config) else None


def _add(auto: Any, mapping: Any, make: Callable[[Any], type | None], keys: Callable[[], Iterable[Any]]) -> None:
    """Add converted models to an Auto class: when they are asked for, or all at once if its mapping has no such place."""
    if hasattr(mapping, "_extra_content"):
        mapping._extra_content = _OnDemand(mapping._extra_content, make, keys)
        return
    for key in keys():
        made = make(key)
        if made:
            auto.register(key, made, exist_ok=True)


def _model_types() -> list[str]:
    return [MODEL_TYPE + stock for stock in (*filter(is_installed, FAMILIES), *WHOLES)]


def _configs() -> list[type]:
    return [config for config in map(_config, _model_types()) if config]


def register_configs() -> None:
    """Make the configuration of every family known that the installed transformers has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    _add(AutoConfig, CONFIG_MAPPING, _config, _model_types)


def register_models() -> None:
    """Make the model of every family known; AutoModelForCausalLM is how multimodal ones are loaded here as well."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto, make in ((AutoModelForCausalLM, _model), (AutoModelForImageTextToText, _whole_model)):
        _add(auto, auto._model_mapping, make, _configs)
