"""The paper of DP-SGD, for the cards of private runs."""

PAPER = {
    "title": "Deep Learning with Differential Privacy",
    "id": "1607.00133",
    "citation": """@inproceedings{abadi2016deep,
    title     = {{Deep Learning with Differential Privacy}},
    author    = {Martin Abadi and Andy Chu and Ian Goodfellow and H. Brendan McMahan and Ilya Mironov and
                 Kunal Talwar and Li Zhang},
    booktitle = {ACM Conference on Computer and Communications Security},
    year      = 2016,
    eprint    = {arXiv:1607.00133},
}""",
}
