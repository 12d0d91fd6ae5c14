// The part of NCCL's interface that weight updates use, between processes of one machine and on CPU memory.
//
// Calls return at once and are carried out in order by a thread per communicator, as a stream of a GPU would. A rank that
// waits for its peers waits for ever, unless it is aborted or a peer's process is gone; that is NCCL's behaviour too.
// Ranks meet in a file of shared memory named by the unique id, in $STUB_NCCL_FOLDER, where `calls` lists all calls.
// $STUB_NCCL_FAULT = KIND:CALL:RANK:NUMBER: the NUMBERth such call of that rank, counted in this process since that was
// set, does not what it should:
//   hang     never gets anywhere        error    fails later, as ncclCommGetAsyncError says
//   refuse   fails at once              die      ends the process
// stub_* are not NCCL's: streams, which stand for CUDA's.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>

namespace {

enum Result { kSuccess = 0, kSystemError = 2, kInvalidArgument = 4, kInvalidUsage = 5, kRemoteError = 6, kInProgress = 7 };
constexpr int kMaxRanks = 16;
constexpr size_t kChunk = 1 << 16;
constexpr int kVersion = 22907;

struct UniqueId {
  char internal[128];
};

struct Config {  // as of NCCL 2.14
  size_t size;
  unsigned magic, version;
  int blocking;
};

struct Shared {
  std::atomic<int> size, joined;
  std::atomic<int> process[kMaxRanks];
  std::atomic<uint64_t> written;              // chunks that a root has put down, over all broadcasts
  std::atomic<uint64_t> read[kMaxRanks];      // of them, by rank
  std::atomic<uint64_t> reduced[kMaxRanks];   // all-reduces begun, by rank
  uint64_t total;                             // bytes of the broadcast that the chunk belongs to
  float term[kMaxRanks][2];                   // of the all-reduce, by rank and its parity
  char chunk[kChunk];
};

struct Stream {
  std::atomic<int> waiting{0};
};

struct Comm {
  Shared* shared = nullptr;
  int rank = 0, size = 0;
  bool blocking = true;
  std::atomic<int> state{kSuccess};
  std::atomic<bool> aborted{false};
  uint64_t reduced = 0;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  bool busy = false, ended = false;
  std::thread worker;
};

std::mutex global;
std::map<std::string, int> counts;
std::string counted_for;  // the fault

std::string folder() {
  const char* found = getenv("STUB_NCCL_FOLDER");
  return found ? found : "/tmp";
}

void record(const char* call, int rank, const std::string& arguments) {
  std::string line = std::string(call) + " " + std::to_string(rank) + " " + arguments + "\n";
  int file = open((folder() + "/calls").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
  if (file >= 0) {
    if (write(file, line.data(), line.size()) < 0) perror("stub_nccl");
    close(file);
  }
}

// The kind of fault that this call has, or "".
std::string fault(const char* call, int rank) {
  const char* found = getenv("STUB_NCCL_FAULT");
  std::string wanted = found ? found : "";
  std::lock_guard<std::mutex> lock(global);
  if (wanted != counted_for) counts.clear(), counted_for = wanted;
  std::string place = std::string(call) + ":" + std::to_string(rank);
  place += ":" + std::to_string(++counts[place]);
  size_t first = wanted.find(':');
  if (first == std::string::npos || wanted.substr(first + 1) != place) return "";
  std::string kind = wanted.substr(0, first);
  if (kind == "die") _exit(9);
  return kind;
}

bool is_gone(int process) {
  char path[64], text[512];
  snprintf(path, sizeof path, "/proc/%d/stat", process);
  FILE* file = fopen(path, "r");
  if (!file) return true;
  size_t size = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[size] = 0;
  const char* end = strrchr(text, ')');
  return !end || end[2] == 'Z' || end[2] == 'X';
}

// Wait until `done`; false when aborted or failed.
bool wait_until(Comm* comm, const std::function<bool()>& done) {
  for (int turn = 0; !done(); ++turn) {
    if (comm->aborted) return false;
    if (turn % 64 == 63) {
      for (int rank = 0; rank < comm->size; ++rank) {
        int process = comm->shared->process[rank];
        if (process && process != getpid() && is_gone(process)) {
          comm->state = kRemoteError;
          return false;
        }
      }
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  return !comm->aborted;
}

void hang(Comm* comm) {
  while (!comm->aborted) std::this_thread::sleep_for(std::chrono::microseconds(100));
}

void work(Comm* comm) {
  std::unique_lock<std::mutex> lock(comm->mutex);
  while (true) {
    comm->changed.wait(lock, [&] { return comm->ended || !comm->queue.empty(); });
    if (comm->queue.empty()) return;
    auto next = std::move(comm->queue.front());
    comm->queue.pop_front();
    lock.unlock();
    next();
    lock.lock();
  }
}

void enqueue(Comm* comm, Stream* stream, std::function<void()> action) {
  if (stream) ++stream->waiting;
  std::lock_guard<std::mutex> lock(comm->mutex);
  comm->queue.push_back([=] {
    if (!comm->aborted && comm->state != kRemoteError) action();
    // What failed stays in its stream, as a kernel that waits for a peer does, until it is aborted.
    if (comm->state != kSuccess && comm->state != kInProgress) hang(comm);
    if (stream) --stream->waiting;
  });
  comm->changed.notify_all();
}

bool join(Comm* comm, const UniqueId& id) {
  std::string path = folder() + "/" + id.internal;
  int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(Shared)) != 0) return false;
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return false;
  comm->shared = static_cast<Shared*>(memory);
  return true;
}

int init(Comm** out, int size, const UniqueId& id, int rank, bool blocking, const char* call) {
  record(call, rank, std::to_string(size) + (blocking ? " blocking" : " nonblocking"));
  std::string kind = fault(call, rank);
  if (kind == "refuse") return kSystemError;
  if (size < 1 || size > kMaxRanks || rank < 0 || rank >= size || !id.internal[0]) return kInvalidArgument;
  auto* comm = new Comm;
  comm->rank = rank, comm->size = size, comm->blocking = blocking;
  if (!join(comm, id)) return kSystemError;
  *out = comm;
  comm->state = kInProgress;
  comm->worker = std::thread(work, comm);
  enqueue(comm, nullptr, [=] {
    if (kind == "hang") return hang(comm);
    if (kind == "error") {
      comm->state = kSystemError;
      return;
    }
    comm->shared->size = size;
    comm->shared->process[rank] = getpid();
    ++comm->shared->joined;
    if (wait_until(comm, [=] { return comm->shared->joined == size; })) comm->state = kSuccess;
  });
  if (!blocking) return kInProgress;
  while (comm->state == kInProgress) std::this_thread::sleep_for(std::chrono::microseconds(50));
  return comm->state;
}

void broadcast(Comm* comm, const char* from, char* to, size_t count, bool root) {
  Shared* shared = comm->shared;
  for (size_t start = 0; start < count; start += kChunk) {
    size_t size = std::min(kChunk, count - start);
    if (root) {
      uint64_t written = shared->written;
      bool free = wait_until(comm, [&] {
        for (int rank = 0; rank < comm->size; ++rank)
          if (rank != comm->rank && shared->read[rank] < written) return false;
        return true;
      });
      if (!free) return;
      shared->total = count;
      memcpy(shared->chunk, from + start, size);
      shared->read[comm->rank] = written + 1;
      shared->written = written + 1;
      if (to != from) memcpy(to + start, from + start, size);
    } else {
      uint64_t seen = shared->read[comm->rank];
      if (!wait_until(comm, [&] { return shared->written > seen; })) return;
      if (shared->total != count) {  // NCCL would not notice, and hang or mix up bytes
        record("mismatch", comm->rank, std::to_string(shared->total) + " " + std::to_string(count));
        comm->state = kInvalidUsage;
        return;
      }
      memcpy(to + start, shared->chunk, size);
      shared->read[comm->rank] = seen + 1;
    }
  }
  if (root)  // a collective is over when all have it
    wait_until(comm, [&] {
      for (int rank = 0; rank < comm->size; ++rank)
        if (shared->read[rank] < shared->written) return false;
      return true;
    });
}

void all_reduce(Comm* comm, const float* from, float* to) {
  Shared* shared = comm->shared;
  uint64_t number = ++comm->reduced;
  shared->term[comm->rank][number % 2] = *from;
  shared->reduced[comm->rank] = number;
  bool all = wait_until(comm, [&] {
    for (int rank = 0; rank < comm->size; ++rank)
      if (shared->reduced[rank] < number) return false;
    return true;
  });
  float sum = 0;
  for (int rank = 0; rank < comm->size; ++rank) sum += shared->term[rank][number % 2];
  if (all) *to = sum;
}

int start(Comm* comm, Stream* stream, const std::string& kind, std::function<void()> action) {
  if (kind == "refuse") return kInvalidUsage;
  if (comm->state != kSuccess) return kInvalidUsage;
  enqueue(comm, stream, [=] {
    if (kind == "hang") return hang(comm);
    if (kind == "error") {
      comm->state = kSystemError;
      return;
    }
    action();
  });
  return comm->blocking ? kSuccess : kInProgress;  // as NCCL may; ncclCommGetAsyncError says success at once
}

}  // namespace

extern "C" {

const char* ncclGetErrorString(int result) {
  switch (result) {
    case kSuccess: return "no error";
    case kSystemError: return "unhandled system error (stub)";
    case kInvalidArgument: return "invalid argument (stub)";
    case kInvalidUsage: return "invalid usage (stub)";
    case kRemoteError: return "remote process exited or there was a network error (stub)";
    case kInProgress: return "in progress (stub)";
    default: return "not in the stub";
  }
}

int ncclGetVersion(int* version) { return *version = kVersion, kSuccess; }

int ncclGetUniqueId(UniqueId* id) {
  memset(id, 0, sizeof *id);
  std::random_device random;
  snprintf(id->internal, sizeof id->internal, "group-%08x%08x", random(), random());
  // Bytes after the name, so that a unique id that is cut or changed on its way is noticed.
  for (int place = 64; place < 128; ++place) id->internal[place] = static_cast<char>(place * 5);
  record("ncclGetUniqueId", 0, id->internal);
  return fault("ncclGetUniqueId", 0) == "refuse" ? kSystemError : kSuccess;
}

static bool whole(const UniqueId& id) {
  for (int place = 64; place < 128; ++place)
    if (id.internal[place] != static_cast<char>(place * 5)) return false;
  return true;
}

int ncclCommInitRank(Comm** comm, int size, UniqueId id, int rank) {
  return whole(id) ? init(comm, size, id, rank, true, "ncclCommInitRank") : kInvalidArgument;
}

int ncclCommInitRankConfig(Comm** comm, int size, UniqueId id, int rank, const Config* config) {
  if (config->magic != 0xcafebeef || config->size < 20 || config->version < 21400) return kInvalidArgument;
  if (config->blocking != 0 && config->blocking != 1) return kInvalidArgument;
  return whole(id) ? init(comm, size, id, rank, config->blocking, "ncclCommInitRankConfig") : kInvalidArgument;
}

int ncclCommGetAsyncError(Comm* comm, int* state) { return *state = comm->state, kSuccess; }

int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Comm* comm, Stream* stream) {
  record("ncclBroadcast", comm->rank, std::to_string(count) + " " + std::to_string(type) + " " + std::to_string(root));
  if (type != 1 || root < 0 || root >= comm->size) return kInvalidArgument;  // uint8 only
  return start(comm, stream, fault("ncclBroadcast", comm->rank), [=] {
    broadcast(comm, static_cast<const char*>(from), static_cast<char*>(to), count, comm->rank == root);
  });
}

int ncclAllReduce(const void* from, void* to, size_t count, int type, int op, Comm* comm, Stream* stream) {
  record("ncclAllReduce", comm->rank, std::to_string(count) + " " + std::to_string(type) + " " + std::to_string(op));
  if (type != 7 || op != 0 || count != 1) return kInvalidArgument;  // one fp32, summed
  return start(comm, stream, fault("ncclAllReduce", comm->rank),
               [=] { all_reduce(comm, static_cast<const float*>(from), static_cast<float*>(to)); });
}

int ncclCommAbort(Comm* comm) {
  record("ncclCommAbort", comm->rank, "");
  comm->aborted = true;
  {
    std::lock_guard<std::mutex> lock(comm->mutex);
    comm->ended = true;
  }
  comm->changed.notify_all();
  comm->worker.join();
  munmap(comm->shared, sizeof(Shared));
  delete comm;
  return kSuccess;
}

#define ABSENT(name) \
  int name() { return kInvalidUsage; }
ABSENT(ncclReduce)
ABSENT(ncclAllGather)
ABSENT(ncclReduceScatter)
ABSENT(ncclSend)
ABSENT(ncclRecv)
ABSENT(ncclCommDestroy)
ABSENT(ncclCommSuspend)
ABSENT(ncclCommResume)
ABSENT(ncclGroupStart)
ABSENT(ncclGroupEnd)
ABSENT(ncclCommWindowRegister)
ABSENT(ncclCommWindowDeregister)
ABSENT(ncclCommQueryProperties)

Stream* stub_stream_new() { return new Stream; }
int stub_stream_query(Stream* stream) { return stream->waiting == 0; }
void stub_stream_synchronize(Stream* stream) {
  while (stream->waiting) std::this_thread::sleep_for(std::chrono::microseconds(20));
}

}  // extern "C"
