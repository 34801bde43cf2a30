# The unit and integration tests on the images' Python: make test-3.14
ARG PYTHON_IMAGE=python:3.14-slim
FROM ${PYTHON_IMAGE}
ARG PIP_INDEX_URL
WORKDIR /src
COPY tools/venv tools/
COPY requirements/dev.txt requirements/uv.txt requirements/
RUN --mount=type=cache,target=/root/.cache UV_LINK_MODE=copy tools/venv /opt/venv requirements/dev.txt
ENV PATH=/opt/venv/bin:$PATH
COPY . .
