from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TransportMetadata(_message.Message):
    __slots__ = ("request_id", "idempotency_key")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    idempotency_key: str
    def __init__(self, request_id: _Optional[str] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SystemInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SystemInfoResponse(_message.Message):
    __slots__ = ("cpu_count", "memory_bytes", "disk_free_bytes", "os_version", "agent_protocol_revision")
    CPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    OS_VERSION_FIELD_NUMBER: _ClassVar[int]
    AGENT_PROTOCOL_REVISION_FIELD_NUMBER: _ClassVar[int]
    cpu_count: int
    memory_bytes: int
    disk_free_bytes: int
    os_version: str
    agent_protocol_revision: int
    def __init__(self, cpu_count: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., disk_free_bytes: _Optional[int] = ..., os_version: _Optional[str] = ..., agent_protocol_revision: _Optional[int] = ...) -> None: ...

class ResourceStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResourceStatsResponse(_message.Message):
    __slots__ = ("cpu_usage_percent", "memory_used_bytes", "memory_total_bytes", "disk_used_bytes", "disk_total_bytes", "process_count", "load_average")
    CPU_USAGE_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_COUNT_FIELD_NUMBER: _ClassVar[int]
    LOAD_AVERAGE_FIELD_NUMBER: _ClassVar[int]
    cpu_usage_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int
    process_count: int
    load_average: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, cpu_usage_percent: _Optional[float] = ..., memory_used_bytes: _Optional[int] = ..., memory_total_bytes: _Optional[int] = ..., disk_used_bytes: _Optional[int] = ..., disk_total_bytes: _Optional[int] = ..., process_count: _Optional[int] = ..., load_average: _Optional[_Iterable[float]] = ...) -> None: ...

class ExecRequest(_message.Message):
    __slots__ = ("command", "args", "working_dir", "env", "user", "metadata", "allocate_pty", "term_rows", "term_cols")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    WORKING_DIR_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    ALLOCATE_PTY_FIELD_NUMBER: _ClassVar[int]
    TERM_ROWS_FIELD_NUMBER: _ClassVar[int]
    TERM_COLS_FIELD_NUMBER: _ClassVar[int]
    command: str
    args: _containers.RepeatedScalarFieldContainer[str]
    working_dir: str
    env: _containers.ScalarMap[str, str]
    user: str
    metadata: TransportMetadata
    allocate_pty: bool
    term_rows: int
    term_cols: int
    def __init__(self, command: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., working_dir: _Optional[str] = ..., env: _Optional[_Mapping[str, str]] = ..., user: _Optional[str] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ..., allocate_pty: _Optional[bool] = ..., term_rows: _Optional[int] = ..., term_cols: _Optional[int] = ...) -> None: ...

class ExecEvent(_message.Message):
    __slots__ = ("stdout", "stderr", "exit_code", "error", "sequence", "request_id", "exec_id")
    STDOUT_FIELD_NUMBER: _ClassVar[int]
    STDERR_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    stdout: bytes
    stderr: bytes
    exit_code: int
    error: str
    sequence: int
    request_id: str
    exec_id: int
    def __init__(self, stdout: _Optional[bytes] = ..., stderr: _Optional[bytes] = ..., exit_code: _Optional[int] = ..., error: _Optional[str] = ..., sequence: _Optional[int] = ..., request_id: _Optional[str] = ..., exec_id: _Optional[int] = ...) -> None: ...

class StdinWriteRequest(_message.Message):
    __slots__ = ("exec_id", "data", "metadata")
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    exec_id: int
    data: bytes
    metadata: TransportMetadata
    def __init__(self, exec_id: _Optional[int] = ..., data: _Optional[bytes] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class StdinWriteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StdinCloseRequest(_message.Message):
    __slots__ = ("exec_id", "metadata")
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    exec_id: int
    metadata: TransportMetadata
    def __init__(self, exec_id: _Optional[int] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class StdinCloseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SignalRequest(_message.Message):
    __slots__ = ("exec_id", "signal", "metadata")
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    exec_id: int
    signal: int
    metadata: TransportMetadata
    def __init__(self, exec_id: _Optional[int] = ..., signal: _Optional[int] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class SignalResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResizeExecPtyRequest(_message.Message):
    __slots__ = ("exec_id", "rows", "cols", "metadata")
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    exec_id: int
    rows: int
    cols: int
    metadata: TransportMetadata
    def __init__(self, exec_id: _Optional[int] = ..., rows: _Optional[int] = ..., cols: _Optional[int] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class ResizeExecPtyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PortForwardFrame(_message.Message):
    __slots__ = ("open", "data")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    open: PortForwardOpen
    data: bytes
    def __init__(self, open: _Optional[_Union[PortForwardOpen, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PortForwardOpen(_message.Message):
    __slots__ = ("target_port", "protocol", "target_host", "metadata")
    TARGET_PORT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TARGET_HOST_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    target_port: int
    protocol: str
    target_host: str
    metadata: TransportMetadata
    def __init__(self, target_port: _Optional[int] = ..., protocol: _Optional[str] = ..., target_host: _Optional[str] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class OciCreateRequest(_message.Message):
    __slots__ = ("container_id", "bundle_path", "metadata")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_PATH_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    bundle_path: str
    metadata: TransportMetadata
    def __init__(self, container_id: _Optional[str] = ..., bundle_path: _Optional[str] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class OciCreateResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OciStartRequest(_message.Message):
    __slots__ = ("container_id", "metadata")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    metadata: TransportMetadata
    def __init__(self, container_id: _Optional[str] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class OciStartResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OciStateRequest(_message.Message):
    __slots__ = ("container_id", "metadata")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    metadata: TransportMetadata
    def __init__(self, container_id: _Optional[str] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class OciStateResponse(_message.Message):
    __slots__ = ("container_id", "status", "pid", "bundle_path")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_PATH_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    status: str
    pid: int
    bundle_path: str
    def __init__(self, container_id: _Optional[str] = ..., status: _Optional[str] = ..., pid: _Optional[int] = ..., bundle_path: _Optional[str] = ...) -> None: ...

class OciExecRequest(_message.Message):
    __slots__ = ("container_id", "command", "args", "env", "working_dir", "user", "metadata")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    WORKING_DIR_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    command: str
    args: _containers.RepeatedScalarFieldContainer[str]
    env: _containers.ScalarMap[str, str]
    working_dir: str
    user: str
    metadata: TransportMetadata
    def __init__(self, container_id: _Optional[str] = ..., command: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., env: _Optional[_Mapping[str, str]] = ..., working_dir: _Optional[str] = ..., user: _Optional[str] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class OciExecResponse(_message.Message):
    __slots__ = ("exit_code", "stdout", "stderr")
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    STDOUT_FIELD_NUMBER: _ClassVar[int]
    STDERR_FIELD_NUMBER: _ClassVar[int]
    exit_code: int
    stdout: str
    stderr: str
    def __init__(self, exit_code: _Optional[int] = ..., stdout: _Optional[str] = ..., stderr: _Optional[str] = ...) -> None: ...

class OciKillRequest(_message.Message):
    __slots__ = ("container_id", "signal", "metadata")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    signal: str
    metadata: TransportMetadata
    def __init__(self, container_id: _Optional[str] = ..., signal: _Optional[str] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class OciKillResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OciDeleteRequest(_message.Message):
    __slots__ = ("container_id", "force", "metadata")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    force: bool
    metadata: TransportMetadata
    def __init__(self, container_id: _Optional[str] = ..., force: _Optional[bool] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class OciDeleteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NetworkServiceConfig(_message.Message):
    __slots__ = ("name", "addr", "network_name")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDR_FIELD_NUMBER: _ClassVar[int]
    NETWORK_NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    addr: str
    network_name: str
    def __init__(self, name: _Optional[str] = ..., addr: _Optional[str] = ..., network_name: _Optional[str] = ...) -> None: ...

class NetworkSetupRequest(_message.Message):
    __slots__ = ("stack_id", "services", "metadata")
    STACK_ID_FIELD_NUMBER: _ClassVar[int]
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    stack_id: str
    services: _containers.RepeatedCompositeFieldContainer[NetworkServiceConfig]
    metadata: TransportMetadata
    def __init__(self, stack_id: _Optional[str] = ..., services: _Optional[_Iterable[_Union[NetworkServiceConfig, _Mapping]]] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class NetworkSetupResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NetworkTeardownRequest(_message.Message):
    __slots__ = ("stack_id", "service_names", "metadata")
    STACK_ID_FIELD_NUMBER: _ClassVar[int]
    SERVICE_NAMES_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    stack_id: str
    service_names: _containers.RepeatedScalarFieldContainer[str]
    metadata: TransportMetadata
    def __init__(self, stack_id: _Optional[str] = ..., service_names: _Optional[_Iterable[str]] = ..., metadata: _Optional[_Union[TransportMetadata, _Mapping]] = ...) -> None: ...

class NetworkTeardownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
