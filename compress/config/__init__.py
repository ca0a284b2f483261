"""The YAML config: schema, loading with positions, and error messages."""

from compress.config.budget_sections import (
    AllocateSection,
    BudgetSection,
    budget_assignments,
)
from compress.config.loader import (
    config_schema,
    load_config,
    load_sweep,
    parse_options,
)
from compress.config.plugins import (
    create_allocator,
    create_exporter,
    create_quantizer,
    create_transform,
)
from compress.config.recover_section import RecoverOptions, RecoverSection
from compress.config.run_section import RunSection
from compress.config.schema import (
    DENSE,
    CalibrationSection,
    Config,
    EvaluateSection,
    ExportEntry,
    ModelSection,
    Override,
    QuantizeSection,
    TransformEntry,
    WeightedSource,
)
from compress.config.sweep_sections import SweepConfig
from compress.config.training_checks import recover_options, tune_options
from compress.config.tune_section import TuneOptions, TuneSection

__all__ = [
    "DENSE",
    "AllocateSection",
    "BudgetSection",
    "CalibrationSection",
    "Config",
    "EvaluateSection",
    "ExportEntry",
    "ModelSection",
    "Override",
    "QuantizeSection",
    "RecoverOptions",
    "RecoverSection",
    "RunSection",
    "SweepConfig",
    "TransformEntry",
    "TuneOptions",
    "TuneSection",
    "WeightedSource",
    "budget_assignments",
    "config_schema",
    "create_allocator",
    "create_exporter",
    "create_quantizer",
    "create_transform",
    "load_config",
    "load_sweep",
    "parse_options",
    "recover_options",
    "tune_options",
]
