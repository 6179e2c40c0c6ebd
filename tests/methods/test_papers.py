"""Every method of the surveys is here: file, recipe, test, mutation, and the paper that card and docstring name."""

import importlib
from pathlib import Path

import pytest

from peftctl.methods import registry

ROOT = Path(__file__).parents[2]
PAPERS = {
    # baselines
    "full": None,
    "last_layers": None,
    "hard_prompt": None,
    # prompts
    "prompt_tuning": "2104.08691",
    "prefix_tuning": "2101.00190",
    "p_tuning": "2103.10385",
    "p_tuning_v2": "2110.07602",
    "intrinsic_prompt_tuning": "2110.07867",
    "multitask_prompt_tuning": "2303.02861",
    # adapters and hybrids
    "houlsby": "1902.00751",
    "pfeiffer": "2005.00247",
    "adapter_fusion": "2005.00247",
    "adapter_drop": "2010.11918",
    "adamix": "2205.12410",
    "sparse_adapter": "2210.04284",
    "compacter": "2106.04647",
    "mam": "2110.04366",
    "unipelt": "2110.07577",
    "s4": "2301.01821",
    "ladder_side_tuning": "2206.06522",
    "ia3": "2205.05638",
    # selective
    "bitfit": "2106.10199",
    "diff_pruning": "2012.07463",
    "far": "2205.01541",
    "fishmask": "2111.09839",
    "neft": "2403.11621",
    "lisa": "2403.17919",
    # the LoRA family
    "lora": "2106.09685",
    "rslora": "2312.03732",
    "lora_plus": "2402.12354",
    "qlora": "2305.14314",
    "dora": "2402.09353",
    "lora_fa": "2308.03303",
    "vera": "2310.11454",
    "delta_lora": "2309.02411",
    "lora_drop": "2402.07721",
    "adalora": "2303.10512",
    "longlora": "2309.12307",
    "mtlora": "2403.20320",
    "loramoe": "2312.09979",
    "molora": "2309.05444",
    "mov": "2309.05444",
    "mola": "2402.08562",
    "relora": "2307.05695",
    "pissa": "2404.02948",
    "olora": "2406.01775",
    "orthogonal_lora": "2310.14152",
    "lora_dropout": "2404.09610",
    "chain_of_lora": "2401.04151",
    "periodic_lora": "2402.16141",
    "krona": "2212.10650",
    "intrinsic_said": "2012.13255",
}
"""Method -> arXiv id of the paper it follows; None for a baseline, which has none of its own."""


def test_the_methods_are_those_of_the_surveys_and_the_librarys_own_types():
    assert len(PAPERS) == 52
    assert set(registry.names()) == {*PAPERS, "peft"}


@pytest.mark.parametrize(("name", "paper"), PAPERS.items())
def test_a_method_has_its_files_and_names_its_paper(name, paper):
    for file in (f"recipes/{name}.yaml", f"tests/methods/test_{name}.py", f"tests/mutations/{name}.patch"):
        assert (ROOT / file).is_file(), file
    if paper is not None:
        assert f"arXiv {paper}" in registry.get(name).card.paper
        assert f"arxiv.org/abs/{paper}" in (importlib.import_module(f"peftctl.methods.{name}").__doc__ or "")
