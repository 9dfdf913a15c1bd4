# Runs `deltaw serve` as an ordinary user. See docs/serve.md.
#   docker build -t deltaw .
#   docker run --rm -p 8000:8000 -e DELTAW_API_KEY -v ./model:/models/base:ro deltaw /models/base

FROM python:3.12-slim AS build
# The compiler builds the kernels for every processor that they are written for, as in any wheel; it stays behind.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/deltaw
ENV PATH=/opt/deltaw/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# The build of torch without CUDA is a tenth as large. Give another index for a GPU.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url ${TORCH_INDEX} "torch>=2.6,<3"
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY src ./src
RUN pip install ".[serve]"

FROM python:3.12-slim
# Products of torch run on OpenMP threads.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin deltaw \
    && install --directory --owner=deltaw --group=deltaw /cache
COPY --from=build /opt/deltaw /opt/deltaw
ENV PATH=/opt/deltaw/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    DELTAW_CACHE=/cache/deltaw \
    HF_HOME=/cache/huggingface
USER 10001
WORKDIR /cache
VOLUME ["/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["deltaw", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
