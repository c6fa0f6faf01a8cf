"""Embeddings to begin with: pieces that stand in the same sentence pairs are near each other."""

import numpy as np
import scipy.sparse
from sklearn.decomposition import TruncatedSVD


def bilingual_embedding(batches, vocabulary_size, features):
    """(V, D) float32 rows of length 1, in which a word is near its translation.

    Latent semantic indexing across languages (Dumais et al. 1997): the leading singular vectors of
    how often each piece is in each pair, weighted by TF-IDF. A piece without a pair is random.

    Args:
        batches: `SentenceBatches` of the training pairs.
        vocabulary_size: number of pieces, V.
        features: number of features, D.
    """
    rows = [np.concatenate(pair) for pair in zip(batches.sources, batches.targets)]
    pair_of_each = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    pieces = np.concatenate(rows)
    counts = scipy.sparse.coo_array(
        (np.ones(len(pieces), "float32"), (pieces, pair_of_each)),
        shape=(vocabulary_size, len(rows)),
    ).tocsr()
    pairs_with_piece = np.diff(counts.indptr)
    counts.data = 1 + np.log(counts.data)
    rarity = np.log((1 + len(rows)) / (1 + pairs_with_piece)) + 0.1
    weighted = scipy.sparse.diags_array(rarity) @ counts
    lengths = np.sqrt((weighted * weighted).sum(axis=0))
    weighted = weighted @ scipy.sparse.diags_array(1 / lengths)
    generator = np.random.default_rng(0)
    embedding = generator.normal(size=(vocabulary_size, features))
    known = pairs_with_piece > 0
    embedding[known] = TruncatedSVD(features, random_state=0).fit_transform(weighted)[known]
    norms = np.linalg.norm(embedding, axis=1, keepdims=True)
    return (embedding / np.maximum(norms, 1e-6)).astype("float32")
