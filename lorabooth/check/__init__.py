"""Advice on photos before an hour of training is spent on them: what is wrong with which photo, what the set lacks, and a verdict.

It looks at photos that were taken in, one at a time, and changes nothing. Knows no torch and no network.
"""
