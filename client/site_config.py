"""A hospital's own YAML: which data may be used, which generalists it has, and what may leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from semisam_core.configuration import Name, StrictModel, parse, read_yaml
from semisam_core.contract import CLASS_SCORES
from semisam_core.data.cases import Inventory, Quarantined, Role, find_cases
from semisam_core.data.names import case_name
from semisam_core.data.patients import (
    MANIFEST,
    labeled_first,
    on_validation_side,
    patients_on_both_sides,
    read_patients,
)
from semisam_core.errors import ConfigError
from semisam_core.generalists.registry import accepted_prompts
from semisam_core.paths import absolute_path
from semisam_core.plan import Plan
from semisam_core.scratch import Scratch


class SplitRule(StrictModel):
    """A split by patient, in place of lists: all scans of a patient are for training, or all for validation.

    Which side a patient is on depends on the seed and the pseudonym alone, so that growing data moves nobody. Patients
    of whom no scan has a label are for training, without labels. Of a patient for validation only scans with a label
    are used, for scoring.

    Attributes:
        validation_share: share of the patients with labels that are for validation; of few patients, the real share may
            be some way off.
        labeled_patients: of how many training patients the labels are used; `all`, or a number.
        seed: another seed gives another split.
    """

    validation_share: float = Field(default=0.2, ge=0, lt=1)
    labeled_patients: Literal["all"] | Annotated[int, Field(ge=0)] = "all"
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0


class SiteData(StrictModel):
    """Where the scans are and what each may be used for.

    Attributes:
        images: folder of images.
        labels: folder of labels; omitted at a site without labels.
        labeled: ids of the cases to train on with their labels; `all` means every case with a label that is not for
            validation.
        validation: ids of the cases whose labels are used for scoring only.
        split: a split by patient, in place of `labeled` and `validation`; None to follow the lists.
        excluded: ids of the cases that must not be used.
        labeled_classes: names of the classes that the label files mark, or `all` of the plan's. A voxel without a label
            may be background or any class not named here.
        reviewed: whether labels that came of reviewing pseudo-labels here are trained on, from the next round on.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("reviewed",)
    images: Path
    labels: Path | None = None
    labeled: Literal["all"] | tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    split: SplitRule | None = None
    excluded: tuple[str, ...] = ()
    labeled_classes: Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all"
    reviewed: bool = True

    @field_validator("labeled", "validation", "excluded")
    @classmethod
    def _as_case_names(cls, value: Literal["all"] | tuple[str, ...]) -> Literal["all"] | tuple[str, ...]:
        return value if value == "all" else tuple(case_name(each) for each in value)

    @model_validator(mode="after")
    def _lists_or_a_rule(self) -> SiteData:
        if self.split is not None and (self.labeled or self.validation):
            raise ValueError("split stands in place of labeled and validation; give either it or them")
        return self

    @field_validator("labeled_classes")
    @classmethod
    def _named_once(cls, value: Literal["all"] | tuple[str, ...]) -> Literal["all"] | tuple[str, ...]:
        if value != "all" and len(set(value)) < len(value):
            raise ValueError("a class is named twice; name each once")
        return value


class SiteGeneralist(StrictModel):
    """A generalist's weights at this site.

    Attributes:
        weights: `packaged` with its Python package, or a file.
        sha256: SHA-256 that the file must have, 64 hexadecimal digits; required for a file.
    """

    weights: Literal["packaged"] | Path = "packaged"
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _hash_of_a_file(self) -> SiteGeneralist:
        if self.weights != "packaged" and self.sha256 is None:
            raise ValueError("a weights file needs its sha256 beside it (64 hexadecimal digits)")
        return self


class Storage(StrictModel):
    """Where the site keeps its state.

    Attributes:
        folder: the site's own storage folder.
        memory_gb: memory for loaded scans and the work on one; a case whose image would take more, or whose
            pseudo-label would (`pseudo_labels/memory.py`), is quarantined.
        embeddings_gb: disk space for stored embeddings.
    """

    folder: Path
    memory_gb: float = Field(default=4.0, gt=0)
    embeddings_gb: float = Field(default=10.0, ge=0)

    def scratch(self) -> Scratch:
        """Return room for the maps of all classes of one scan."""
        return Scratch(self.folder / "scratch")


class Egress(StrictModel):
    """Limits on what may leave. A plan cannot loosen them.

    Attributes:
        maximum_update_mb: size limit of an update.
        validation_scores: the validation scores that may leave.
        feature_head: whether the plan's feature head may be trained on this site's labels. If not, the site sends back
            the one that it was sent. The head carries the mean volume of each labeled structure.
        fingerprint: whether aggregates over the scans may be written for the lead, before there is a plan.
        numbers: `rounded` puts counts of scans into buckets, rounds all other numbers, and withholds those about fewer
            patients than the minimum; `exact` sends every number as it is, for public or generated data.
        minimum_patients: a number about fewer patients than this is withheld, in a fingerprint also under `exact`.
        significant_digits: of scores, losses and all else that is neither a count nor in a fingerprint.
        epsilon: whether the epsilon of each private round, and the total of its patients, is sent with the update.
    """

    maximum_update_mb: float = Field(default=500.0, gt=0)
    validation_scores: tuple[str, ...] = CLASS_SCORES
    feature_head: bool = True
    fingerprint: bool = True
    numbers: Literal["rounded", "exact"] = "rounded"
    minimum_patients: int = Field(default=5, ge=1)
    significant_digits: int = Field(default=2, ge=1, le=6)
    epsilon: bool = False

    @field_validator("validation_scores")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(CLASS_SCORES))
        if unknown:
            raise ValueError(f"unknown scores {unknown}; accepted: {', '.join(CLASS_SCORES)}")
        return value


class PrivacyLimits(StrictModel):
    """What a site allows to be spent of its patients' privacy. A plan cannot loosen it.

    Attributes:
        required: refuse plans without a privacy section.
        maximum_epsilon: refuse a round after which the patients would have spent more, over all studies of the ledger.
        minimum_noise: refuse plans with a smaller noise multiplier.
        maximum_delta: refuse plans with a larger delta.
        ledger: folder of the ledger, outside of any one study; None for a folder in the site's storage.
        noise: `secure` from the operating system's cryptographic generator; `seeded` repeats a simulation bit by bit
            and protects nobody, so a deployed site refuses to work with it.
    """

    required: bool = False
    maximum_epsilon: float = Field(default=10.0, gt=0)
    minimum_noise: float = Field(default=0.3, ge=0)
    maximum_delta: float = Field(default=1e-5, gt=0, le=1e-3)
    ledger: Path | None = None
    noise: Literal["secure", "seeded"] = "secure"


class SiteConfig(StrictModel):
    """One hospital. The files in `site_configs/` explain every key.

    Attributes:
        version: version of this format.
        site: the site's name, which appears in the server's record.
        generalists: the generalists that this site has, by name.
        device: `auto` takes a GPU if there is one; or `cpu`, `cuda`, `cuda:1`.
        threads: CPU threads; None for all.
    """

    version: Literal[1]
    site: Name
    data: SiteData
    generalists: dict[str, SiteGeneralist] = Field(default_factory=dict)
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)
    storage: Storage
    egress: Egress = Egress()
    privacy: PrivacyLimits = PrivacyLimits()

    @property
    def ledger_folder(self) -> Path:
        """The folder of the site's privacy ledger."""
        return self.privacy.ledger or self.storage.folder / "privacy"

    @field_validator("generalists")
    @classmethod
    def _known_generalists(cls, value: dict[str, SiteGeneralist]) -> dict[str, SiteGeneralist]:
        for name in value:
            accepted_prompts(name)
        return value

    def torch_device(self) -> torch.device:
        """Return the device to compute on.

        Raises:
            ConfigError: the YAML names a GPU that this machine lacks.
        """
        available = torch.cuda.is_available()
        if self.device == "auto":
            return torch.device("cuda" if available else "cpu")
        device = torch.device(self.device)
        if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
            raise ConfigError(
                f"site {self.site}: device = {self.device!r}: this machine offers "
                f"{torch.cuda.device_count() if available else 0} GPUs; accepted: auto, cpu, cuda, cuda:<number>."
            )
        return device


def load_site_config(path: Path) -> SiteConfig:
    """Read a site's YAML. Its relative paths are resolved against the YAML's own folder.

    Raises:
        ConfigError: a key or value is invalid; the message names file, key, value and what is accepted.
    """
    config = parse(SiteConfig, read_yaml(path), str(path))
    base = absolute_path(path, "site file").parent

    def absolute(value: Path, key: str) -> Path:
        return absolute_path(value, f"{path}: {key}", base)

    data = config.data.model_copy(
        update={
            "images": absolute(config.data.images, "data.images"),
            "labels": absolute(config.data.labels, "data.labels") if config.data.labels else None,
        }
    )
    generalists = {
        name: entry
        if entry.weights == "packaged"
        else entry.model_copy(update={"weights": absolute(entry.weights, f"generalists.{name}.weights")})
        for name, entry in config.generalists.items()
    }
    storage = config.storage.model_copy(update={"folder": absolute(config.storage.folder, "storage.folder")})
    ledger = config.privacy.ledger
    privacy = config.privacy.model_copy(
        update={"ledger": absolute(ledger, "privacy.ledger") if ledger is not None else None}
    )
    changed = {"data": data, "generalists": generalists, "storage": storage, "privacy": privacy}
    return config.model_copy(update=changed)


def load_site_folder(folder: Path) -> list[SiteConfig]:
    """Read every YAML of a folder, in the order of file names.

    Raises:
        ConfigError: there is none, one is invalid, or two sites share a name or a storage folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: the folder of site files does not exist.")
    paths = sorted(path for path in folder.iterdir() if path.suffix in {".yaml", ".yml"})
    if not paths:
        raise ConfigError(f"{folder}: the folder contains no site file (.yaml).")
    configs: list[SiteConfig] = []
    seen: dict[str, Path] = {}
    for path in paths:
        config = load_site_config(path)
        for what, value in (("site", config.site), ("storage.folder", str(config.storage.folder))):
            if value in seen:
                raise ConfigError(f"{path}: {what} = {value!r}: {seen[value]} has the same; each site needs its own.")
            seen[value] = path
        configs.append(config)
    return configs


def makes_pseudo_labels(config: SiteConfig, plan: Plan) -> bool:
    """Return whether the plan wants pseudo-labels and this site can make them, by generalists or from other sources."""
    policy = plan.pseudo_labels
    return policy is not None and (policy.method == "evidence" or bool(usable_generalists(config, plan)))


def usable_generalists(config: SiteConfig, plan: Plan) -> tuple[str, ...]:
    """Return the plan's generalists that this site has, in the plan's order."""
    if plan.pseudo_labels is None:
        return ()
    return tuple(name for name in plan.pseudo_labels.generalists if name in config.generalists)


def annotated_classes(config: SiteConfig, plan: Plan) -> tuple[int, ...]:
    """Return the plan's classes, counted from 1, that the site's label files mark.

    Raises:
        ConfigError: the site names a class that the plan lacks.
    """
    names = plan.class_names
    if config.data.labeled_classes == "all":
        return tuple(range(1, len(names) + 1))
    unknown = [name for name in config.data.labeled_classes if name not in names]
    if unknown:
        raise ConfigError(
            f"site {config.site}: data.labeled_classes names {', '.join(unknown)}; the plan's classes are "
            f"{', '.join(names)}. Accepted: all, or a list of some of these."
        )
    return tuple(k for k, name in enumerate(names, start=1) if name in config.data.labeled_classes)


def site_cases(config: SiteConfig, channels: int, patients: Mapping[str, str] | None) -> Inventory:
    """Find the site's cases by file names, and by the manifest if they were imported.

    Args:
        config: the site's YAML.
        channels: number of channels per case.
        patients: case -> patient by the import's manifest, or None if there is none.

    Raises:
        ConfigError: folders or lists are invalid.
    """
    return _of_known_patients(_found(config.data, channels, patients or {}), patients)


def inventory(config: SiteConfig, plan: Plan) -> Inventory:
    """Find the site's cases and check that it has something to learn from under the plan.

    Raises:
        ConfigError: folders, lists, manifest or class names are invalid, a patient is on both sides of the split, or
            the site has neither a labeled case nor any of the plan's generalists.
    """
    annotated_classes(config, plan)
    patients = read_patients(config.data.images)
    found = site_cases(config, len(plan.task.channels), patients)
    _check_sides(config.site, found, patients or {})
    has_label = any(case.role is Role.LABELED for case in found.cases)
    if plan.pseudo_labels is not None and not has_label and not usable_generalists(config, plan):
        raise ConfigError(
            f"site {config.site}: it has no labeled case and none of the plan's generalists "
            f"({', '.join(plan.pseudo_labels.generalists)}), so it has nothing to learn from. Name labeled cases under "
            "data.labeled or a generalist under generalists."
        )
    return found


def _found(data: SiteData, channels: int, patients: Mapping[str, str]) -> Inventory:
    """Find the cases, with the roles that the lists or the split by patient give them."""
    if data.split is None:
        labeled = None if data.labeled == "all" else data.labeled
        return find_cases(data.images, data.labels, channels, labeled, data.validation, data.excluded)
    everything = find_cases(data.images, data.labels, channels, None, (), data.excluded)
    patient_of = {case.id: patients.get(case.id, case.id) for case in everything.cases}
    marked = {patient_of[case.id] for case in everything.of(Role.LABELED)}
    rule = data.split
    held_out = {patient for patient in marked if on_validation_side(patient, rule.validation_share, rule.seed)}
    chosen = labeled_first(marked - held_out, rule.seed)
    chosen = chosen if rule.labeled_patients == "all" else chosen[: rule.labeled_patients]
    role_of = dict.fromkeys(chosen, Role.LABELED) | dict.fromkeys(held_out, Role.VALIDATION)
    cases = []
    for case in everything.cases:
        role = role_of.get(patient_of[case.id], Role.UNLABELED)
        if case.label is not None:
            cases.append(replace(case, role=role, label=None if role is Role.UNLABELED else case.label))
        elif role is not Role.VALIDATION:  # without a label it cannot be scored, and may not be trained on
            cases.append(case)
    return Inventory(tuple(cases), everything.quarantined)


def _of_known_patients(found: Inventory, patients: Mapping[str, str] | None) -> Inventory:
    """Quarantine cases that the manifest does not name: they may be of a patient on the other side."""
    if patients is None:
        return found
    reason = f"{MANIFEST} does not name it, so its patient is unknown; import it, or move it to another folder"
    unknown = tuple(Quarantined(case.id, reason) for case in found.cases if case.id not in patients)
    return Inventory(tuple(case for case in found.cases if case.id in patients), found.quarantined + unknown)


def _check_sides(site: str, found: Inventory, patients: Mapping[str, str]) -> None:
    both = patients_on_both_sides({case.id: case.role is Role.VALIDATION for case in found.cases}, patients)
    if both:
        patient, (trained, scored) = next(iter(both.items()))
        more = f" (and {len(both) - 1} more patients)" if len(both) > 1 else ""
        raise ConfigError(
            f"site {site}: the patient {patient}{more} is on both sides of the split: {trained} is for training, "
            f"{scored} for validation. List all scans of a patient under data.validation, or none; exclude some; or "
            "let data.split divide by patient."
        )
