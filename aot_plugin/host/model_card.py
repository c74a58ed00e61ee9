"""The paper that TRL cites in the model card of a trained model."""

import textwrap

PAPER = {
    "title": "Distributional Preference Alignment of LLMs via Optimal Transport",
    "id": "2406.05882",
    "citation": textwrap.dedent("""\
        @inproceedings{melnyk2024distributional,
            title        = {{Distributional Preference Alignment of LLMs via Optimal Transport}},
            author       = {Igor Melnyk and Youssef Mroueh and others},
            year         = 2024,
            booktitle    = {Advances in Neural Information Processing Systems 37 (NeurIPS 2024)},
            eprint       = {2406.05882},
            archivePrefix = {arXiv},
        }"""),
}
