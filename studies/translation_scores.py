"""How good translations are, and how far one gets without translating."""

import numpy as np
import sacrebleu
from sklearn.feature_extraction.text import TfidfVectorizer


def scores(translations, references):
    """BLEU and chrF of a corpus, each from 0 to 100, as sacrebleu defines them."""
    return {
        "bleu": sacrebleu.corpus_bleu(translations, [references]).score,
        "chrf": sacrebleu.corpus_chrf(translations, [references]).score,
    }


def translation_memory(sources, train):
    """For each source the translation of the most similar training sentence, by TF-IDF.

    Args:
        sources: list of texts.
        train: `datasets.pairs.Pairs`.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    known = vectorizer.fit_transform(train.sources)
    nearest = np.asarray((vectorizer.transform(sources) @ known.T).argmax(axis=1)).ravel()
    return [train.targets[index] for index in nearest]
