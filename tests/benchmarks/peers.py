"""Other libraries' ways to a Fisher or Gauss-Newton diagonal, as their documentation has them.

Each maker gets a problem of its own (models are rewritten by some) and imports its package itself:
one that is not installed, or cannot, is a row that says so. Nothing is corrected: what a peer gets
wrong, and its scale, is found by ``truth.judge``.
"""

from __future__ import annotations

from peers_by_layer import asdl, backpack, kronfluence, nngeometry
from peers_by_product import batch_summed, curvlinops, laplace, vmap_grad
from rows import Row

PEERS = [
    Row("ASDL `fisher_mc`, 1 draw", asdl("fisher_mc"), "asdfghjkl"),
    Row("ASDL `fisher_mc`, 2 draws", asdl("fisher_mc", 2), "asdfghjkl"),
    Row("ASDL `fisher_exact`", asdl("fisher_exact"), "asdfghjkl", exact=True),
    Row("nngeometry `FIM_MonteCarlo`, 1 draw", nngeometry(1), "nngeometry", mean=True),
    Row("nngeometry `FIM_MonteCarlo`, 2 draws", nngeometry(2), "nngeometry", mean=True),
    Row("nngeometry `FIM` (exact)", nngeometry(None), "nngeometry", exact=True, mean=True),
    Row(
        "BackPACK `SumGradSquared`",
        backpack("SumGradSquared", "sum_grad_squared"),
        "backpack-for-pytorch",
    ),
    Row(
        "BackPACK `DiagGGNMC`, 1 draw",
        backpack("DiagGGNMC", "diag_ggn_mc", mc_samples=1),
        "backpack-for-pytorch",
    ),
    Row(
        "BackPACK `DiagGGNExact`",
        backpack("DiagGGNExact", "diag_ggn_exact"),
        "backpack-for-pytorch",
        exact=True,
    ),
    Row(
        "BackPACK `BatchDiagHessian` (Î₂)",
        backpack("BatchDiagHessian", "diag_h_batch"),
        "backpack-for-pytorch",
    ),
    Row("kronfluence, strategy `diagonal`", kronfluence, "kronfluence"),
    Row(
        "curvlinops `hutchinson_diag` of the GGN, 1 probe",
        curvlinops("GGNLinearOperator"),
        "curvlinops-for-pytorch",
    ),
    Row(
        "curvlinops `hutchinson_diag` of `FisherMC`, 1 probe",
        curvlinops("FisherMCLinearOperator"),
        "curvlinops-for-pytorch",
    ),
    Row(
        "Laplace `BackPackGGN`, stochastic",
        laplace("BackPackGGN", stochastic=True),
        "laplace-torch",
    ),
    Row("Laplace `AsdlGGN`, stochastic", laplace("AsdlGGN", stochastic=True), "laplace-torch"),
    Row(
        "Laplace `CurvlinopsGGN` (its default)", laplace("CurvlinopsGGN"), "laplace-torch", exact=True
    ),
    Row("`torch.func` `vmap(grad)`", vmap_grad, "torch"),
    Row("one batch-summed backward (Hutchinson)", batch_summed, "torch"),
]
