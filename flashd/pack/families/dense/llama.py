"""Llama 2 and 3, Mistral, and what was made from them; Mixtral has the same keys and tensors."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder, Mixture

LLAMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
MISTRAL = {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8}
INTERNLM_3 = {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "num_key_value_heads": 2, "head_dim": 128}
"""What transformers takes if config.json leaves it out."""

FAMILIES = (
    Family(
        "llama", "Llama 2 and 3, Mistral, Mixtral, SmolLM2, InternLM 3, ReluLLaMA, ProSparse, TurboSparse-Mistral",
        "SmolLM2-135M, tiny",
        permuted=True, may_have=("qkv", "output", "inputs", "down"), mixture=Mixture(),
        folders=(
            Folder("llama", permuted=True, defaults=LLAMA),
            Folder("internlm3", permuted=True, defaults=INTERNLM_3),
            Folder("mistral", permuted=True, defaults={**MISTRAL, "sliding_window": 4096}),
            Folder("mixtral", permuted=True, defaults={**MISTRAL, "rms_norm_eps": 1e-5, "rope_theta": 1e6}),
            Folder(  # ProSparse
                "sparsellama", permuted=True, defaults=LLAMA,
                keys={"hidden_activation_threshold": "hidden_act_param"},
            ),
            # Bamboo, TurboSparse-Mistral
            Folder("bamboo", permuted=True, defaults=MISTRAL, activations={"relu": "drelu"}),
        ),
    ),
)  # fmt: skip
