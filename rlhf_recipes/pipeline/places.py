"""Where the keys of a pipeline are written, for messages about them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_recipes.config.origins import Origin, Source
from rlhf_recipes.pipeline.schema import PipelineConfig, StageEntry
from rlhf_recipes.pipeline.settings import SET


@dataclass(frozen=True)
class Places:
    """Where the keys of a pipeline are written: in its file, by `--set`, or a stage's.

    Parameters:
        config: its file.
        set_keys: scope -> keys of `--set`.
    """

    config: Path
    set_keys: Mapping[str, Sequence[str]]

    def of_file(self) -> Origin:
        """Return the places of the file's own keys."""
        return Origin((Source(SET, self.set_keys.get("", ())),), Source(file=self.config))

    def of_arguments(self, content: PipelineConfig) -> Origin:
        """Return the places of the arguments of all stages."""
        in_file = Source("arguments", content.arguments, self.config, ("arguments",))
        return Origin((Source(f"{SET}: arguments", self.set_keys.get("arguments", ())), in_file), in_file)

    def of_entry(self, number: int, entry: StageEntry) -> Origin:
        """Return the places of an entry's own keys."""
        return Origin((), Source(f"stages: {entry.name}", StageEntry.model_fields, self.config, ("stages", number)))

    def of_stage(
        self, number: int, content: PipelineConfig, own: Collection[str], file: Path | None, written: Collection[str]
    ) -> Origin:
        """Return the places of a stage's arguments, those that take precedence first.

        Args:
            number: of its entry.
            content: of the pipeline's file.
            own: keys that the pipeline sets for each stage.
            file: the stage's YAML file; None if its keys stand in the pipeline's.
            written: the keys in that.
        """
        entry = content.stages[number]
        place, shared = self.of_entry(number, entry).default, self.of_arguments(content).sources
        inline = Source(place.label, written, self.config, (*place.steps, "config"))
        sources = (
            Source(f"{SET}: {entry.name}", self.set_keys.get(entry.name, ())),
            Source(place.label, entry.arguments, self.config, (*place.steps, "arguments")),
            Source(place.label, own, self.config, place.steps),
            *([inline, *shared] if file is None else [*shared, Source(keys=written, file=file)]),
        )
        return Origin(sources, place)
