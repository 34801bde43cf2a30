"""The samples of a `/metrics` document."""

from collections import Counter
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]


@dataclass
class Exposition:
    """The samples of a `/metrics` document, by name and sorted labels."""

    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Exposition":
        """Read Prometheus' text format.

        Raises:
            ValueError: It is something else, or has a sample twice.
        """
        samples: dict[tuple[str, Labels], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                if key in samples:
                    raise ValueError(f"{key} is there twice")
                samples[key] = sample.value
        return cls(samples)

    def only(self, name: str, **labels: str) -> float | None:
        """Return the sample with this name and exactly these labels; None without one."""
        return self.samples.get((name, tuple(sorted(labels.items()))))

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of all samples with this name that carry these labels."""
        wanted = labels.items()
        return sum(value for (key, have), value in self.samples.items() if key == name and wanted <= set(have))

    def by(self, name: str, label: str) -> Counter[str]:
        """Sum the samples with this name for each value of a label; zeros are left out."""
        return Counter({value: number for (value,), number in self.by_labels(name, label).items()})

    def by_labels(self, name: str, *labels: str) -> Counter[tuple[str, ...]]:
        """Sum the samples with this name for each combination of these labels' values; zeros are left out."""
        sums: Counter[tuple[str, ...]] = Counter()
        for (key, have), value in self.samples.items():
            if key == name:
                given = dict(have)
                sums[tuple(given.get(label, "") for label in labels)] += int(value)
        return +sums
