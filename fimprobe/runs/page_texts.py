"""The style sheet of a run's page, and the words that its glossary explains."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2229; --soft: #5c6672; --page: #ffffff; --card: #f4f6f8;
  --line: #d9dee4; --mark: #2f6fbd }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ec; --soft: #98a3af; --page: #14171b;
  --card: #1d2228; --line: #343b44; --mark: #79b0f0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1320px; padding: 24px 20px 64px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 18px; margin: 40px 0 4px }
p { margin: 4px 0 12px; max-width: 75ch } .soft { color: var(--soft) }
p.notes { max-width: none; font-size: 13px }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 }
.tile { background: var(--card); border-radius: 8px; padding: 12px 16px; flex: 1 1 190px }
.tile b { display: block; font-size: 24px; line-height: 1.3; white-space: nowrap }
.tile span { color: var(--soft) }
.advice { background: var(--card); border-left: 4px solid var(--mark); border-radius: 4px;
  padding: 12px 16px 12px 34px; margin: 0 } .advice li { margin: 4px 0 }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr));
  gap: 0 32px }
.scroll { overflow-x: auto } figure { margin: 8px 0; overflow-x: auto }
svg { max-width: 100%; height: auto; display: block; color: var(--ink) }
svg text { font-family: system-ui, sans-serif !important }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap } th { vertical-align: bottom; white-space: normal; min-width: 70px }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
tr.total td { font-weight: 600; border-top: 2px solid var(--line) }
dt { font-weight: 600; margin-top: 6px } dd { margin: 0 0 0 0 } summary { cursor: pointer }
"""

WORDS = {
    "F": "the Fisher information of the model's parameters: the mean over inputs of the covariance "
    "of the gradient of log p, where p is the model's probability of a label drawn from it. Its "
    "diagonal is measured.",
    "Î₁, Î₂": "two unbiased estimates of F: the mean outer product of gradients of log p, and minus "
    "the mean Hessian of log p. They differ in variance.",
    "trace F": "the sum of the diagonal of F ± its standard error over inputs and drawn labels.",
    "error": "the error of this report: how far off its F is, with its inputs and its labels. It is "
    "the standard error of the diagonal of F over the size of that diagonal (root of the sum of "
    "squares of both). 10 % is good; from 100 % on it is noise.",
    "1 label": "the error with 1 label: how far off an estimator would be with one label, drawn from "
    "the model, for each input. It holds however the labels of this report were drawn.",
    "size-biased labels": "labels drawn more often where their gradient is large, and weighted back: "
    "F stays the same, and labels that carry F are seen however rare they are.",
    "pair": "one input with one label, drawn from the model. 100 inputs with 2 labels each are 200 "
    "pairs, but their errors from the choice of inputs are those of 100 inputs.",
    "pairs for 10 %": "how many pairs, one label for each input, an error of 10 % takes, ± the "
    "standard error of that number.",
    "label variance, input variance": "how much the diagonal of F from one pair varies with its "
    "label, and with its input.",
    "verdict": "trusted where the error of Î₁ is at most 10 %, or how many inputs that takes, with "
    "labels as in this report.",
    "–": "not measured, not defined, or unknown, for the reasons below the table.",
    "output Fisher": "the Fisher information of the model's outputs, a mean over inputs. For labels "
    "that are classes, its trace goes to 0 as the model grows confident.",
    "bound/...": "a bound over the value that it bounds; 1 is equality. diagonal: the label variance "
    "of the diagonal of F; matrix: that of all entries; covariance: the norm of the covariance, "
    "bounded by Soen & Sun (2021), eq. 17 for Î₁ and eq. 18 for Î₂.",
}
