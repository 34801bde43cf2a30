# The image of the gateway. Build it from the repository's root:
#   DOCKER_BUILDKIT=1 docker build -f docker/gateway.Dockerfile -t llm-gateway/gateway .
# Another package index: --build-arg PIP_INDEX_URL (compose.yaml passes on the variable of that name).
ARG PYTHON_IMAGE=python:3.14-slim

# Dependencies alone, so that a change of the code does not install them again. The venv gets no pip of its own.
FROM ${PYTHON_IMAGE} AS dependencies
ARG PIP_INDEX_URL
RUN python -m venv --without-pip /opt/venv
COPY requirements/gateway.txt /requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip --disable-pip-version-check --python /opt/venv/bin/python install \
    --no-deps --only-binary :all: --require-hashes --requirement /requirements.txt

# The code, compiled: the root is read-only later. The hash in a .pyc instead of a time makes builds repeatable.
FROM dependencies AS code
COPY gateway /app/gateway
RUN python -m compileall -q --invalidation-mode unchecked-hash /app

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 app && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin app
WORKDIR /app
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=code /app /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    APP_MODE=prod \
    HOST=0.0.0.0 \
    PORT=8000
# Last of the layers' inputs, so that another version or revision rebuilds nothing. The Makefile knows both.
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="llm-gateway" \
      org.opencontainers.image.description="The LLM gateway that stays up when the model does not, and shows why." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=20s --retries=3 CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=2); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "gateway"]
