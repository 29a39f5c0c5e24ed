"""Topics of documents from their embeddings, which lie in one column of lists.

python examples/embeddings.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import gmm_dist

DIMENSIONS, TOPICS, DOCUMENTS = 32, 6, 9_000


def write_documents(folder: Path) -> np.ndarray:
    """Write documents with unit vectors about the directions of their topics; return these."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(TOPICS, DIMENSIONS))
    topic = rng.integers(TOPICS, size=DOCUMENTS)
    X = directions[topic] + 0.35 * rng.normal(size=(DOCUMENTS, DIMENSIONS))
    X = (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), DIMENSIONS)
    pq.write_table(
        pa.table({"id": np.arange(DOCUMENTS), "embedding": vectors}), folder / "a.parquet"
    )
    return topic


def main() -> None:
    """Fit diagonal mixtures to the column, and compare the components with the topics."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        topic = write_documents(folder)
        lake = gmm_dist.Lake(url=name, columns=["embedding"])
        selection = gmm_dist.select(lake, n_components=range(4, 9), covariance_type="diag")
        X = np.stack(pq.read_table(folder / "a.parquet")["embedding"].to_numpy())
    print(selection)
    labels = selection.best.predict(X)
    pure = sum(np.bincount(topic[labels == k]).max() for k in np.unique(labels)) / len(topic)
    n_components = selection.best.n_components
    print(f"{n_components} components; {pure:.1%} of the documents lie with their topic")


if __name__ == "__main__":
    main()
