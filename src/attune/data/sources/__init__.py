"""Where preference data comes from: one source, one file. A source is a module of this folder with

    Config                          its settings, a `SourceConfig`: the `data` block without `source`
    GIVES: tuple[str, ...]          what it has: "prompts", and "pairs" or "images", single ones that people liked or
                                    not; a method that learns from something else cannot use it
    FREE_PROMPTS: bool              whether its prompts may be any text; False: all are of the embedded grammar,
                                    the only prompts that the scorer `oracle` can score
    recognises(path) -> bool        whether a file or folder here looks like this source's, for `attune init`
    read(config, seed, generate_images, quota) -> Iterator[Row]
    needs_files(config) -> list[Path]
    split_sizes(config) -> dict[str, int] | None
    listed_prompts(config) -> Iterator[str] | None

`read` looks whether its files are there when it is called and raises `SourceError` if not. It yields rows one by
one as it finds them; decoding and checking them is the work of `attune.data.ingest`. It may call
`generate_images(prompts, ordinals, desc)` for images of the base model, and stops reading a split of which
`quota` wants no more pairs.

The other three are for the plan, which asks them before any work. They are quick, download nothing and open no
image:
`needs_files`     the files and folders here that `read` reads, there or not; [] for the Hub and for generated data.
`split_sizes`     what `splits.count_rows` counts (`prompts/<split>`, `pairs/<split>`, `choices/train`, and so on), as
                  far as it can be known: some of the names, or None. A source of files here that knows
                  `prompts/train` is read once more before a model is loaded, for all that can be judged without an
                  image.
                  Rows that turn out bad are counted, so `prepare` can end with fewer.
`listed_prompts`  prompts that `prepare` will find, as far as they can be known; None for none of them.
The last two raise `SourceError` as `read` does.

A source that knows all its prompts before an image is opened has the settings `validation_prompts` and `test_prompts`,
whose null the plan replaces by what the runs ask for, and puts its rows into splits with `splits.with_splits`.

Rows and their types are in `attune.data.rows`, splits in `attune.data.splits`. Importing a source must be quick:
no torch, and pandas or scipy only inside functions.
"""
