"""The rooms of the package, in the order of their floors."""

ROOMS = {
    "_version": "",
    "engines": "",
    "engines.primitives": "",
    "errors": "",
    "torchvision_compat": "",
    "likelihoods": "errors",
    "model.copies": "errors",
    "model": "errors model.copies",
    "model.fsdp": "errors model",
    "engines.layers": "model",
    "engines.problem": "engines.primitives errors likelihoods model model.fsdp",
    "penalties": "errors model",
    "statistics": "likelihoods",
    "training.capture": "errors model model.fsdp",
    "training.likelihood_inference": "errors likelihoods model training.capture",
    "training": "errors likelihoods model model.fsdp training.capture training.likelihood_inference",
    "estimators": "errors statistics",
    "config": "errors estimators likelihoods training",
    "engines.backpack": "engines.problem errors model statistics torchvision_compat",
    "engines.tracing": "engines.layers engines.problem errors model",
    "jacobian_bounds": "engines.problem model",
    "distributed": "errors jacobian_bounds likelihoods model.fsdp statistics",
    "engines.moments": "engines.layers engines.primitives engines.problem engines.tracing model "
    "statistics",
    "report": "_version config errors estimators likelihoods model statistics",
    "engines.curvature": "engines.backpack engines.layers engines.moments engines.primitives "
    "engines.problem engines.tracing model statistics",
    "engines.spot_checks": "engines.layers engines.problem engines.tracing errors likelihoods model "
    "statistics",
    "plots": "estimators report",
    "sinks": "config errors report",
    "engines.autograd": "engines.backpack engines.curvature engines.layers engines.moments "
    "engines.primitives engines.problem engines.spot_checks engines.tracing errors likelihoods "
    "model model.fsdp statistics",
    "runs": "errors estimators plots report sinks",
    "sinks.tensorboard": "errors estimators plots report sinks training",
    "measurement": "config distributed engines.autograd engines.backpack engines.problem "
    "engines.spot_checks engines.tracing errors estimators jacobian_bounds likelihoods model "
    "model.fsdp report statistics training.likelihood_inference",
    "fisher.sums": "engines.autograd engines.problem engines.tracing estimators likelihoods "
    "measurement model statistics",
    "fisher.streaming": "_version distributed errors fisher.sums measurement model statistics "
    "training.likelihood_inference",
    "fisher": "_version distributed errors estimators fisher.streaming fisher.sums likelihoods "
    "measurement model model.fsdp report training.likelihood_inference",
    "fisher.audit": "errors fisher fisher.streaming fisher.sums likelihoods measurement model report "
    "training.likelihood_inference",
    "probe": "config distributed engines.tracing errors likelihoods measurement model model.fsdp "
    "report sinks sinks.tensorboard training training.capture training.likelihood_inference",
    "fimprobe": "_version config distributed engines.tracing errors estimators fisher fisher.audit "
    "likelihoods measurement penalties probe report runs sinks",
    "cli": "config errors fimprobe measurement report runs",
    "__main__": "cli",
}
"""Each room, and what it may import; a room stands below those that import it."""
