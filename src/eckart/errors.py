"""Every error the package raises on purpose, as a tree; catch at the level you care about.

    EckartError
    ├── UserError               something the caller can mend; the command line exits with 2
    │   ├── ModelError          no such model, no weights, nothing to compress, NaN in a weight
    │   ├── DataError           no such text, empty text, fewer tokens than one window
    │   ├── BudgetError         a budget outside the reachable range
    │   ├── PlanError           a plan that does not fit the model
    │   ├── CheckpointError     a folder that is not, or no longer, what was saved
    │   ├── OutputError         an output folder that cannot be written
    │   └── OptionError         an unknown method, recipe or option
    └── NumericalError          NaN or infinity arose while computing; the command line exits with 1

Each message names the thing, the value, the rule and the fix, in one line.
"""


class EckartError(Exception):
    """Base of every error raised on purpose."""


class UserError(EckartError):
    """The caller can mend it; exit code 2 at the command line."""


class ModelError(UserError):
    """The model cannot be found, read or compressed."""


class DataError(UserError):
    """The text cannot be found or is too short."""


class BudgetError(UserError):
    """The budget cannot be met."""


class PlanError(UserError):
    """The plan does not fit the model."""


class CheckpointError(UserError):
    """The folder is not, or is no longer, a checkpoint as it was saved."""


class OutputError(UserError):
    """The output cannot be written."""


class OptionError(UserError):
    """A method, recipe or option is unknown or out of range."""


class NumericalError(EckartError):
    """NaN or infinity arose in a computation; the message names the module."""
