"""The part of the model that both processes run.

It is the only package of shared that imports torch when it is imported.

Letters in shapes: B sequences, L steps of a sequence, H imagined steps, E environments, A action size,
S stochastic size (`stoch`), D deterministic size (`deter`), F = S + D (`feat` = [stoch, deter]), N = B * L starts.
"""
