import skips


def test_what_was_skipped_is_summed_up_by_what_it_lacks() -> None:
    reasons = [
        "Skipped: no CUDA device",
        "Skipped: needs the published weights of jina-reranker-v1-turbo-en, which are not in the Hugging Face cache",
        "Skipped: no CUDA device: the interpreter computes in numpy, which has no bf16",
        "Skipped: TURBORANK_CONFORMANCE names no folder for the clients",
        "Skipped: no openssl on this machine to make a certificate with",
    ]
    assert skips.summary(reasons) == (
        "1 need published weights or data, 2 need a GPU, 1 need client environments, "
        "1: no openssl on this machine to make a certificate with"
    )
