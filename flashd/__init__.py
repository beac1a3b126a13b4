"""flashd: language models larger than RAM, their feed-forward rows paged from flash."""

__version__ = "0.1.0"
