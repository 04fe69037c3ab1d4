"""The study of the losses: what is trained, by which rules, and what came out.

`plan.py` lists the questions, `trial.py` trains one run, `__main__.py` trains what is missing, and
`summary.py` makes tables of the results.
"""
