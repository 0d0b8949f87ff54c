"""The Arrow schema of every table, with what each column means in its field's metadata."""

import pyarrow as pa


def column(name: str, kind: pa.DataType, description: str, *, nullable: bool = True) -> pa.Field:
    """Return a field that carries its description and unit, as Parquet readers and the catalog show it."""
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})


SAMPLE_ID = column("sample_id", pa.string(), "128 bits of sha256 over key, image bytes and caption, 32 hex digits")

SAMPLES = pa.schema(
    [
        SAMPLE_ID,
        column("key", pa.string(), "the source's own key"),
        column(
            "image",
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            "original bytes as they came and the name they had; the layout of datasets' Image feature",
        ),
        column("caption", pa.string(), "caption as it came"),
        column("url", pa.string(), "where the image was downloaded from, if the source says"),
        column(
            "source",
            pa.struct([("path", pa.string()), ("member", pa.string())]),
            "file the sample came from, and the member or row in it",
        ),
        column("metadata", pa.string(), "all other fields of the source as a JSON object"),
    ]
)

QUARANTINE = pa.schema(
    [
        column("quarantine_id", pa.string(), "32 hex digits over source, reason and digest: the same fault once"),
        column("key", pa.string(), "the source's own key"),
        SAMPLES.field("source"),
        column("reason", pa.string(), "what is wrong, one word with underscores: truncated, not_an_image, …"),
        column("detail", pa.string(), "the error's own words"),
        column("digest", pa.string(), "sha256 of the bytes, or null if there were none"),
        column("size", pa.int64(), "bytes"),
    ]
)

PAIRS = pa.schema(
    [
        column("left_id", pa.string(), "sample_id; `left` alone is a reserved word in SQL"),
        column("right_id", pa.string(), "sample_id, greater than left_id"),
        column("distance", pa.float32(), "0 for equal bytes or pixels, differing bits of 64, or 1 - cosine"),
    ]
)

DECISIONS = pa.schema(
    [
        SAMPLE_ID,
        column("kept", pa.bool_(), "true if no condition failed and the sample is nobody's duplicate"),
        column(
            "failed",
            pa.list_(pa.string()),
            "names of all conditions the sample fails, in order; else the limit that left it out",
        ),
        column(
            "duplicate_of",
            pa.string(),
            "sample_id of the sample that stands in its place: kept, or left out by a limit",
        ),
        column("duplicate_rule", pa.string(), "the duplicate rule that joins the two"),
        column(
            "duplicate_distance", pa.float32(), "distance of the pair that joins them, or that ends a chain of such"
        ),
        column("contaminated_by", pa.string(), "sample_id of the evaluation sample it is a copy of"),
    ]
)

SPLIT = column("split", pa.string(), "train, validation or test: a function of the duplicate group")

FACES_BLURRED = column("faces_blurred", pa.int32(), "faces blurred in this copy; 0 if it has the original bytes")
"""A column that curated shards begin with where faces are blurred; other columns describe the original image."""

CURATED = SAMPLES.append(SPLIT)
"""Columns every curated shard begins with; the signals the snapshot was decided on follow (embeddings excepted)."""

PUBLISHED = pa.schema([SAMPLE_ID, SPLIT])
"""Every sample a dataset has ever published, with its split: it never moves to another."""

DIFFERENCE = pa.schema(
    [
        SAMPLE_ID,
        column("change", pa.string(), "added or removed, since the snapshot before"),
        column("cause", pa.string(), "new_sample, left_pool, condition or duplicate"),
        column("failed", pa.list_(pa.string()), "conditions it fails now (removed) or failed before (added)"),
        column("duplicate_of", pa.string(), "survivor it stands back for now (removed) or stood back for (added)"),
        column("duplicate_rule", pa.string(), "the duplicate rule that joins, or joined, the two"),
        column("because", pa.string(), "what changed in the policy, the signals or the pool to bring it about"),
    ]
)

DOCUMENT_ID = column("document_id", pa.string(), "128 bits of sha256 over key and segments, 32 hex digits")

DOCUMENTS = pa.schema(
    [
        DOCUMENT_ID,
        column("key", pa.string(), "the source's own key, such as the page's address"),
        column(
            "segments",
            pa.list_(
                pa.struct(
                    [
                        ("kind", pa.string()),
                        ("text", pa.string()),
                        ("sample_id", pa.string()),
                        ("url", pa.string()),
                        ("reason", pa.string()),
                    ]
                )
            ),
            "texts and images in order; an image is a sample of the pool, or has the reason why it is missing",
        ),
        column("text_digest", pa.string(), "128 bits of sha256 over all texts, 32 hex digits"),
        SAMPLES.field("source"),
        column("metadata", pa.string(), "all other fields of the source as a JSON object"),
    ]
)
"""Interleaved documents `documents/<pool>/<shard>.parquet`; their images are the pool's shard of the same name."""

NODE_DECISIONS = pa.schema(
    [
        DOCUMENT_ID,
        column("position", pa.int32(), "number of the segment in the document, from 0"),
        column("kind", pa.string(), "text or image"),
        column("sample_id", pa.string(), "the image's sample; null for texts and missing images"),
        column("kept", pa.bool_(), "true if it stays in its document, should that be kept"),
        column("failed", pa.list_(pa.string()), "names of all conditions it fails; missing or unmatched for images"),
        column("duplicate_of", pa.string(), "sample_id of the image that stands in its place"),
        column("duplicate_rule", pa.string(), "the duplicate rule that joins the two"),
        column("text_position", pa.int32(), "position of the text that an image is assigned to, if matched"),
        column("similarity", pa.float32(), "cosine of image and assigned text, -1 to 1"),
        column("place", pa.int32(), "number of the segment in the published document; null if left out"),
    ]
)

DOCUMENT_DECISIONS = pa.schema(
    [
        DOCUMENT_ID,
        column("key", pa.string(), "the source's own key"),
        column("kept", pa.bool_(), "true if no condition failed and no other document stands in its place"),
        column("failed", pa.list_(pa.string()), "names of all conditions the document fails, in the policy's order"),
        column("duplicate_of", pa.string(), "document_id of the kept document that stands in its place"),
        column("duplicate_rule", pa.string(), "the column of one_per in which the two are equal"),
        column("texts", pa.int32(), "text segments"),
        column("images", pa.int32(), "image segments, missing ones included"),
        column("missing_images", pa.int32(), "image segments without an image"),
        column("missing_share", pa.float32(), "share of missing ones among image segments, 0-1; 0 without any"),
        column("kept_texts", pa.int32(), "text segments that stay"),
        column("kept_images", pa.int32(), "images that stay"),
    ]
)

DOCUMENT_DIFFERENCE = pa.schema(
    [
        DOCUMENT_ID,
        column("key", pa.string(), "the source's own key"),
        column("change", pa.string(), "added or removed since the snapshot before; changed: published in both"),
        column("cause", pa.string(), "new_document, left_pool, condition or duplicate; segments or order for changed"),
        column("failed", pa.list_(pa.string()), "conditions it fails now (removed) or failed before (added)"),
        column("duplicate_of", pa.string(), "document it stands back for now (removed) or stood back for (added)"),
        column("duplicate_rule", pa.string(), "the column of one_per in which the two are, or were, equal"),
        column("because", pa.string(), "what changed in the policy, the signals or the pool to bring it about"),
        column(
            "segments",
            pa.list_(
                pa.struct(
                    [
                        ("position", pa.int32()),
                        ("kind", pa.string()),
                        ("sample_id", pa.string()),
                        ("change", pa.string()),
                        ("because", pa.string()),
                    ]
                )
            ),
            "of a document in both snapshots, kept or not: the texts and images that came or went, and why",
        ),
    ]
)

INTERLEAVED = pa.schema(
    [
        DOCUMENT_ID,
        column("key", pa.string(), "the source's own key"),
        column(
            "images",
            pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "original images in order, null where a text stands; the layout of OBELICS",
        ),
        column("texts", pa.list_(pa.string()), "texts in order, null where an image stands"),
        column(
            "nodes",
            pa.list_(pa.struct([("position", pa.int32()), ("sample_id", pa.string()), ("similarity", pa.float32())])),
            "for each of them: its position in the pool's document, an image's sample and its cosine with its text",
        ),
        SPLIT,
        SAMPLES.field("source"),
        column("metadata", pa.string(), "all other fields of the source as a JSON object"),
    ]
)
"""Columns of published documents."""

RUNS = pa.schema(
    [
        column("run_id", pa.string(), "fingerprint of recipe, snapshot, base model and code version of the step"),
        column("recipe", pa.string(), "the training configuration as JSON"),
        column("dataset", pa.string(), "dataset of the snapshot trained on"),
        column("snapshot", pa.int64(), "number of the snapshot trained on"),
        column("base_model", pa.string(), "path or hub name as given"),
        column("base_model_fingerprint", pa.string(), "over the base model's files, or its hub revision"),
        column("chat_template_fingerprint", pa.string(), "over the template's text"),
        column("adapter_uri", pa.string(), "folder of the adapter"),
        column("parent_run", pa.string(), "run whose adapter this one started from"),
        column("samples", pa.int64(), "rows trained on"),
        column("steps", pa.int64(), "optimizer steps"),
        column("train_loss", pa.float64(), "mean over the last ten steps, nats per supervised token"),
        column("metrics_uri", pa.string(), "Parquet table of all logged metrics"),
        column("seconds", pa.float64(), "wall time of training, s"),
        column("device", pa.string(), "device trained on"),
        column("code_version", pa.string(), "version of Tamis"),
        column("created_at", pa.string(), "ISO 8601, UTC"),
    ]
)

EXAMPLES = pa.schema(
    [
        column("run_id", pa.string(), "run"),
        column("example_id", pa.string(), "sample, or interleaved document, that it was trained on"),
    ]
)
"""What a run was given: those of the train split that have a prompt and an answer."""

PREFLIGHTS = pa.schema(
    [
        column("preflight_id", pa.string(), "fingerprint of samples, recipe, base model, device and library versions"),
        column("dataset", pa.string(), "dataset of the snapshot that was to be trained on"),
        column("snapshot", pa.int64(), "number of the snapshot"),
        column("base_model", pa.string(), "path or hub name as given"),
        column("device", pa.string(), "device that it is to be trained on"),
        column("check", pa.string(), "which check: loss mask, prompt, trained layers, quantisation, …"),
        column("subject", pa.string(), "what it looked at: a sample, a part of the model, …"),
        column("status", pa.string(), "ok; noted: deserves a look; failed: the training must not start"),
        column("measured", pa.string(), "what was found, in words with units"),
        column("wanted", pa.string(), "what it should be"),
        column("remedy", pa.string(), "what to change; empty if ok"),
        column("created_at", pa.string(), "ISO 8601, UTC"),
    ]
)

EVALUATIONS = pa.schema(
    [
        column(
            "evaluation_id",
            pa.string(),
            "fingerprint of model, adapter, snapshot, split and generation settings",
        ),
        column("run_id", pa.string(), "run whose adapter was on; null for the base model alone"),
        column("base_model", pa.string(), "path or hub name as given"),
        column("dataset", pa.string(), "dataset of the snapshot"),
        column("snapshot", pa.int64(), "number of the snapshot"),
        column("split", pa.string(), "split the prompts came from"),
        column("samples", pa.int64(), "prompts answered"),
        column("exact_match", pa.float64(), "share of answers equal to the expected one after normalisation, 0–1"),
        column("exact_match_low", pa.float64(), "lower end of the 95 % interval"),
        column("exact_match_high", pa.float64(), "upper end of the 95 % interval"),
        column("answers_uri", pa.string(), "Parquet table of every prompt and answer"),
        column("seconds", pa.float64(), "wall time, s"),
        column("created_at", pa.string(), "ISO 8601, UTC"),
    ]
)

MERGES = pa.schema(
    [
        column("merge_id", pa.string(), "fingerprint of run, base model and method"),
        column("run_id", pa.string(), "run whose adapter was merged"),
        column("method", pa.string(), "how: dequantize, then merge"),
        column("model_uri", pa.string(), "folder of the merged model"),
        column("kl_per_token", pa.float64(), "mean KL(adapter on base ‖ merged) over compared tokens, nats"),
        column("max_logit_difference", pa.float64(), "largest absolute difference of a logit"),
        column("agreement", pa.float64(), "share of compared tokens with the same most likely token, 0–1"),
        column("tokens", pa.int64(), "tokens compared"),
        column("created_at", pa.string(), "ISO 8601, UTC"),
    ]
)
