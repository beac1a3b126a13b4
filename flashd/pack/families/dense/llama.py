"""Llama 2 and 3, Mistral, and what was made from them; Mixtral has the same keys and tensors."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder, Mixture

FAMILIES = (
    Family(
        "llama", "Llama 2 and 3, Mistral, Mixtral, SmolLM2, ReluLLaMA, ProSparse, TurboSparse-Mistral",
        "SmolLM2-135M, tiny",
        permuted=True, may_have=("qkv", "output"), mixture=Mixture(),
        folders=(
            Folder("llama", also=("mistral", "mixtral"), permuted=True),
            # ProSparse
            Folder("sparsellama", permuted=True, keys={"hidden_activation_threshold": "hidden_act_param"}),
            Folder("bamboo", permuted=True, activations={"relu": "drelu"}),  # Bamboo, TurboSparse-Mistral
        ),
    ),
)  # fmt: skip
