"""How translations of two models differ, and which words the experts of a decoder serve."""

import numpy as np
import sacrebleu
import scipy.stats
from comparisons import interval
from subwords import UNKNOWN

from keras_moe import inspection

METRICS = {"BLEU": sacrebleu.BLEU(), "chrF": sacrebleu.CHRF()}
RESAMPLES = 2000
SHOWN_VERSES, SHOWN_WORDS, SHOWN_EXPERTS = 6, 8, 16
# A word that is read less often may be with one expert by chance.
LEAST = 20


def score(texts, references):
    """BLEU and chrF, each from 0 to 100."""
    return {
        name: metric.corpus_score(texts, [references]).score for name, metric in METRICS.items()
    }


def print_differences(mixture, dense, references):
    """BLEU and chrF of runs of a mixture minus those of a dense model, with two 95% intervals.

    One is Student's t over seeds. The other is a paired bootstrap (Koehn 2004) of the mean over
    seeds: texts are drawn with replacement, the same for all runs.
    """
    rows = np.arange(len(references))
    for name, metric in METRICS.items():
        by_seed = differences(metric, mixture, dense, references)
        drawn = scipy.stats.bootstrap(
            (rows,),
            lambda rows, by_seed=by_seed: np.mean(by_seed(rows)),
            n_resamples=RESAMPLES,
            vectorized=False,
            method="percentile",
            rng=0,
        )
        low, high = drawn.confidence_interval
        above = np.mean(drawn.bootstrap_distribution > 0)
        print(
            f"difference in {name}: {interval(by_seed(rows))} over seeds; over {len(rows):,} texts "
            f"{low:+.2f} to {high:+.2f}, above 0 in {above:.1%} of {RESAMPLES:,} resamples"
        )


def differences(metric, mixture, dense, references):
    """A function of rows of the texts: by seed, the mixture's score of these minus the other's."""

    def counts(runs):
        # As in sacrebleu's own bootstrap, which takes one run of each model.
        each = (metric._extract_corpus_statistics(run["texts"], [references]) for run in runs)
        return [np.array(statistics) for statistics in each]

    def scores(runs, rows):
        sums = [statistics[rows].sum(axis=0) for statistics in runs]
        return [metric._compute_score_from_stats(list(each)).score for each in sums]

    mixture, dense = counts(mixture), counts(dense)
    return lambda rows: np.subtract(scores(mixture, rows), scores(dense, rows))


def print_drawn(texts):
    """Some rows of lists of texts by name, drawn at random."""
    number = len(next(iter(texts.values())))
    rows = np.random.default_rng(0).choice(number, min(SHOWN_VERSES, number), replace=False)
    for row in rows:
        print()
        for name, column in texts.items():
            print(f"{name}: {column[row]}")


def words_by_expert(model, batches, subwords):
    """Shares of the tokens and typical words of the experts of the last decoder block.

    Typical are the words that an expert serves the most often relative to how often all experts
    together serve them (lift). A word is served where the decoder reads it, to predict the next.
    """
    inputs = [each for each, *_ in batches]
    *_, routings = inspection.record_routings(model, inputs).values()
    counts = np.zeros((routings[0].probs.shape[-1], len(subwords)), int)
    for each, routing in zip(inputs, routings):
        read = np.broadcast_to(each["target"].reshape(-1, 1), routing.indices.shape)
        served = routing.indices >= 0
        np.add.at(counts, (routing.indices[served], read[served]), 1)
    counts[:, : 1 + UNKNOWN] = 0
    totals = counts.sum(axis=0)
    lift = counts / np.maximum(totals, LEAST) * (totals >= LEAST)
    typical = [[index for index in np.argsort(-row)[:SHOWN_WORDS] if row[index]] for row in lift]
    shares = counts.sum(axis=1) / counts.sum()
    return [
        {"share": float(share), "words": subwords.pieces(row)}
        for share, row in zip(shares, typical)
    ]


def print_words(experts):
    """Of the experts that serve the most tokens."""
    print("\nThe busiest experts of the last decoder block: share of the tokens, typical words")
    order = sorted(range(len(experts)), key=lambda index: -experts[index]["share"])
    for index in order[:SHOWN_EXPERTS]:
        print(f"{index:3}  {experts[index]['share']:.1%}  {' '.join(experts[index]['words'])}")
