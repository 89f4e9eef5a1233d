"""The diagonal of F over a data set, to a stated error, and what it decides.

``estimate`` streams the data, ``FisherSums`` adds up, ``StoppingRule`` decides when the error is
reached, ``Fisher`` is the result. See docs/guides/estimate.md.
"""
