// Picker: the replica on which a request will likely begin to answer first.
//
// Each replica is judged by the prompt tokens that come before the request's first token there: those of the
// request itself that are not cached, those that wait, and the share of a running request's steps, in tokens.
// So a cached prefix draws requests until the queue before it costs more than computing the prefix elsewhere.
//
// Loads come in reports, and are old when they come; what was sent to a replica since is added to them, and
// what it will have worked off meanwhile taken away.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "epp/prefix_index.h"

namespace twinjet::epp {

// All in tokens, but as said.
struct PickerOptions {
  double prefill_per_s = 10000;  // at which a replica works off what waits, per second
  double running_tokens = 16;    // what a running request costs one that comes
  double waiting_tokens = 256;   // the same of a waiting one, beside its prompt
  double kv_penalty = 4;         // by which each token is weighted for which the KV cache has no room
  double report_lag_s = 0.15;    // a report may be so old when it comes
  double report_life_s = 5.0;    // and counts for so long
  double memory_s = 120;         // time constant in which what was sent is forgotten
  double max_waiting = 64;       // requests waiting at a replica from which on it is full
};

struct ReplicaLoad {
  double waiting = 0;
  double running = 0;
  double waiting_tokens = 0;
  double kv_utilization = 0;  // 0 to 1
};

struct Choice {
  ReplicaId replica;
  double cost;
  uint32_t cached_tokens;
  double waiting;  // requests that wait there, as far as known
  double assigned;
  bool is_full;
};

class Picker {
 public:
  explicit Picker(const PickerOptions& options) : options_(options) {}

  // The ids of removed replicas come again.
  ReplicaId Add();
  void Remove(ReplicaId id);
  // kv_tokens: what the replica's KV cache holds; 0: not known.
  void SetKvTokens(ReplicaId id, double kv_tokens) { replicas_[id].kv_tokens = kv_tokens; }
  // now: seconds on any clock, the same in all calls.
  void Report(ReplicaId id, const ReplicaLoad& load, double now);

  // Orders the candidates, best first, and gives the first `count`. cached: by replica, in tokens of the
  // prompt; none for those left out. random: any bits; they decide among equals.
  void Rank(std::span<const ReplicaId> candidates, int64_t num_tokens, std::span<const Match> cached,
            double now, uint64_t random, size_t count, std::vector<Choice>* choices);
  // A request with so many tokens to compute went to the replica; gives its ticket.
  uint64_t Begin(ReplicaId id, int64_t num_tokens, double now);
  // It ended. Each ticket once.
  void End(ReplicaId id, uint64_t ticket, int64_t num_tokens);

  bool Has(ReplicaId id) const { return id < replicas_.size() && replicas_[id].is_used; }
  size_t size() const { return num_used_; }
  int64_t in_flight(ReplicaId id) const { return replicas_[id].in_flight; }

 private:
  struct Sent {
    uint64_t ticket;
    double time;
    int64_t num_tokens;
    bool has_ended = false;
  };
  struct Replica {
    bool is_used = false;
    ReplicaLoad load;
    double reported_at = -1e300;
    double kv_tokens = 0;
    std::deque<Sent> sent;    // since the report
    int64_t sent_tokens = 0;  // of those that have not ended
    double backlog = 0;       // tokens to compute before those of a request that comes, at the time below
    double backlog_at = 0;
    int64_t num_sent = 0;
    int64_t in_flight = 0;  // ours, whatever the reports say
    int64_t in_flight_tokens = 0;
    uint32_t cached = 0;  // of Rank()
    double assigned = 0;  // tokens sent there, less those of long ago
    double assigned_at = 0;
  };

  static void ForgetSent(Replica* replica, double before);
  static void Settle(Replica* replica, Sent* sent);
  double Backlog(const Replica& replica, double now) const;
  Choice Judge(ReplicaId id, int64_t num_tokens, double now) const;

  PickerOptions options_;
  std::vector<Replica> replicas_;
  std::vector<ReplicaId> free_;
  size_t num_used_ = 0;
  uint64_t next_ticket_ = 0;
};

}  // namespace twinjet::epp
