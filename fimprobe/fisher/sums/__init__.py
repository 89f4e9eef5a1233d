"""Sums over the inputs of a data set, and the diagonal of F and its errors from them."""
