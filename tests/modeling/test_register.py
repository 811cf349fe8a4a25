"""The converted models in transformers' Auto classes: made when they are asked for, and for no other model."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
)

from mla_convert.modeling import register
from mla_convert.modeling.configuration_mla import config_class
from mla_convert.modeling.modeling_mla import model_class
from mla_convert.source.families import FAMILIES, WHOLES, is_installed

INSTALLED = [*filter(is_installed, FAMILIES), *WHOLES]


def test_no_model_is_imported_before_it_is_asked_for(convert_pico):
    program = """
import sys
import mla_convert
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1])
assert type(config).__name__ == "MlaLlamaConfig", type(config)
from transformers import AutoModelForCausalLM
loaded = {name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name}
assert loaded == {"transformers.models.auto.modeling_auto"}, loaded
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__ == "mla_convert.modeling.modeling_mla"
"""
    out = convert_pico("llama", rank=10, rope_dim=6).out
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(out)], check=True)


@pytest.mark.parametrize("family", INSTALLED)
def test_every_family_is_known(family):
    config = CONFIG_MAPPING[f"mla_{family}"]
    assert config.model_type == f"mla_{family}"
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        mapping = auto._model_mapping
        known = auto is AutoModelForCausalLM or family in WHOLES
        assert (config in mapping) is known
        if known:
            assert mapping[config].__name__.startswith("Mla") and mapping[config].config_class is config


def test_nothing_else_is_known():
    class MlaLlamaConfig(LlamaConfig):  # of somebody else
        model_type = "mla_llama"

    for name in ("mla_", "mla_unheard_of", "mla_mla_llama"):
        assert name not in CONFIG_MAPPING
        with pytest.raises(KeyError):
            CONFIG_MAPPING[name]
    for key in (MlaLlamaConfig, "MlaLlamaConfig", None):
        assert key not in AutoModelForCausalLM._model_mapping
    assert CONFIG_MAPPING["llama"] is LlamaConfig


def test_a_mapping_of_another_kind_gets_all_at_once():
    """A private attribute serves above; without it, the public function does."""
    registered = {}
    auto = SimpleNamespace(register=lambda key, made, exist_ok: registered.update({key: made}))
    register._add(auto, object(), register._model, register._configs)
    llama = config_class(LlamaConfig)
    assert registered[llama] is model_class(LlamaForCausalLM)
    assert len(registered) == len(INSTALLED)


def test_whoever_asks_for_all_gets_all():
    """Iterating, counting and copying, in a process of its own: here the tests above have asked for them one by one."""
    program = f"""
import copy, pickle
import mla_convert
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
names = {[f"mla_{family}" for family in INSTALLED]!r}
assert CONFIG_MAPPING._extra_content.get("mla_unheard_of") is None
assert not set(names) - set(CONFIG_MAPPING) and not set(names) - set(CONFIG_MAPPING.keys())
for each in (copy.deepcopy(CONFIG_MAPPING), pickle.loads(pickle.dumps(CONFIG_MAPPING))):
    assert each["mla_llama"] is CONFIG_MAPPING["mla_llama"]
mapping = AutoModelForCausalLM._model_mapping
assert {{CONFIG_MAPPING[name] for name in names}} == set(mapping._extra_content.keys())
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_threads_get_the_same_classes():
    program = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
import mla_convert
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
sys.setswitchinterval(1e-6)
for name in {[f"mla_{family}" for family in INSTALLED[:8]]!r}:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: CONFIG_MAPPING[name], range(8)))
    assert all(each is found[0] for each in found), name
with ThreadPoolExecutor(8) as threads:
    models = list(threads.map(lambda _: AutoModelForCausalLM._model_mapping[CONFIG_MAPPING["mla_llama"]], range(8)))
assert all(each is models[0] for each in models)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
