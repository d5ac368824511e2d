# One image for CUDA and CPUs: torch's wheels include CUDA, and the host provides the driver (--gpus all).
# Any base with `python3` 3.11 or newer and its venv module works.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS builder
# For a private index or a mirror: --secret id=pip.conf,src=..., or pip's own variables as build arguments.
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
# For an image without CUDA, which is gigabytes smaller: the index of PyTorch's builds for CPUs (docs/deployment.md).
ARG TORCH_INDEX
WORKDIR /build
COPY requirements.txt constraints.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && { [ -z "$TORCH_INDEX" ] || /opt/venv/bin/pip install --disable-pip-version-check --no-deps \
        -c constraints.txt --index-url "$TORCH_INDEX" torch; } \
    && /opt/venv/bin/pip install --disable-pip-version-check -r requirements.txt \
    && /opt/venv/bin/pip uninstall --yes pip
WORKDIR /app
COPY . .
# Compile now, because the root file system is read-only at run time. Then check that the default model is inside.
RUN rm requirements.txt constraints.txt \
    && /opt/venv/bin/python -m compileall -q . \
    && /opt/venv/bin/python -c "from embedding_service.inference import source as s; \
assert s.resolve(s.DEFAULT_MODEL, None).origin.startswith('package'), 'the default model is not inside'"
# Prepare the default model, so that the first start takes seconds, even with a root file system that is read-only.
ARG PREPARE_MODEL=all-MiniLM-L6-v2
ENV CACHE_FOLDER=/opt/prepared DEVICE=cpu
RUN mkdir "$CACHE_FOLDER" \
    && { [ "$(uname -m)" != x86_64 ] \
        || { /opt/venv/bin/python -m embedding_service download "$PREPARE_MODEL" >/tmp/prepared \
            && grep -F "is prepared" /tmp/prepared; }; }
# --build-arg WITHOUT=torch makes an image for prepared models on CPUs alone, which is gigabytes smaller.
ARG WITHOUT
RUN [ -z "$WITHOUT" ] || { python3 -m venv /tmp/pip && /tmp/pip/bin/pip --python /opt/venv/bin/python \
    uninstall --yes torch transformers sentence-transformers triton scipy scikit-learn sympy networkx \
    && rm -rf /opt/venv/lib/python3*/site-packages/nvidia /tmp/pip; }

FROM ${BASE_IMAGE}
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="embedding-service" \
      org.opencontainers.image.description="Text embeddings over HTTP: one model, one batching queue, many web workers" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Models from the hub go to /models; mount a volume there to keep them.
RUN groupadd --gid 10001 service \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin service \
    && install -d -o 10001 -g 10001 /models /opt/prepared \
    # SageMaker runs `docker run IMAGE serve` and expects port 8080.
    && printf '%s\n' '#!/bin/sh' "exec env PORT=\${PORT:-8080} python /app/app.py" > /usr/local/bin/serve \
    && chmod 755 /usr/local/bin/serve
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /app /app
COPY --from=builder --chown=10001:10001 /opt/prepared /opt/prepared
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/models \
    CACHE_FOLDER=/opt/prepared \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('PORT') or os.environ.get('AIP_HTTP_PORT') or 8001}/health\", timeout=4)"]
# Options alone, as of Text Embeddings Inference's image, are those of `serve`.
ENTRYPOINT ["sh", "/app/deploy/entrypoint.sh"]
CMD []
