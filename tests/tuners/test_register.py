"""Our tuner types in peft's tables. Who writes them there, and who does not: tests/methods/test_houlsby.py."""

import peft
import pytest
from peft import mapping
from peft.utils import register_peft_method

from peftctl.tuners._register import OURS, register_types


def test_the_tables_are_where_we_write_and_hold_peft_own_types_beside_ours():
    """Fails loudly where peft moves them, and where it opens the front door."""
    tables = (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    )
    for table in tables:
        assert type(table) is dict and "LORA" in table and peft.PeftType.LORA in table
        assert OURS.keys() <= table.keys()
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["LORA"] == "lora_"
    with pytest.raises(ValueError, match="Unknown PEFT type"):
        register_peft_method(name="peftctl_x", config_cls=peft.LoraConfig, model_cls=peft.LoraModel)


def test_every_reader_of_the_tables_sees_our_types():
    """peft's modules bound the tables at import: they must be these very dictionaries."""
    from peft import mapping_func, peft_model
    from peft.tuners import tuners_utils
    from peft.utils import save_and_load

    assert peft_model.PEFT_TYPE_TO_CONFIG_MAPPING is mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    assert peft_model.PEFT_TYPE_TO_TUNER_MAPPING is mapping.PEFT_TYPE_TO_TUNER_MAPPING
    assert save_and_load.PEFT_TYPE_TO_TUNER_MAPPING is mapping.PEFT_TYPE_TO_TUNER_MAPPING
    assert tuners_utils.PEFT_TYPE_TO_PREFIX_MAPPING is mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    assert mapping_func.PEFT_TYPE_TO_CONFIG_MAPPING is mapping.PEFT_TYPE_TO_CONFIG_MAPPING


def test_our_names_are_none_of_peft_own():
    assert not OURS.keys() & {kind.value for kind in peft.PeftType}
    assert all(name.startswith("PEFTCTL_") for name in OURS)
    prefixes = {tuner.prefix for _, tuner in OURS.values()}
    stock = {mapping.PEFT_TYPE_TO_PREFIX_MAPPING.get(kind.value) for kind in peft.PeftType}
    assert not stock & prefixes  # tuners of one family share theirs: no model has two of them


def test_registering_twice_changes_nothing():
    before = dict(mapping.PEFT_TYPE_TO_TUNER_MAPPING)
    register_types()
    assert before == mapping.PEFT_TYPE_TO_TUNER_MAPPING
