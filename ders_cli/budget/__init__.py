"""Spending a byte budget: which codec every matrix of every expert gets (docs/budget.md).

spend.py     the main road; limits.py: what may be spent; spent.py: what it bought
measure.py   bytes and predicted errors of every candidate
choice.py    the knapsack and its solvers; pmq.py: MC#'s programme of bits per expert, and its importance
folder.py    a budget for the whole output
rules.py     a plan as few rules
low_rank.py  a budget for ranks; ranks.py: their allocation
"""
