// Pump: takes an engine's steps and puts them into all streams that they concern, in one call.
//
//   SequenceKey first = pump.Add(stream, account);    // keys first .. first + n - 1 go to the engine
//   pump.Step(outputs, now);                          // any thread
//   Report& report = pump.Collect(ledger);            // the thread of the scheduler, when it gets to it
//   pump.Remove(first);
//
// A step does everything that is per token: text, ends, merging, counting, and, for streams with a carrier,
// sending. What the scheduler must hear of waits for Collect(): requests whose prompt is done, that got their
// first tokens, that are about to leave, that are over; and sums. Thread-safe, but Collect() and what it
// touches belong to one thread; and so does everything where the vocabulary is a function
// (Joining::kFunction), which may take other locks than these.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "sched/kv_ledger.h"
#include "stream/step_outputs.h"
#include "stream/stream.h"

namespace twinjet::stream {

// Where a request's tokens are accounted for.
struct Account {
  int32_t tenant = 0;             // an index of the caller's, small: sums are kept for each
  int64_t leaves_at = INT64_MAX;  // tokens at which the request counts as leaving
  bool has_holding = false;
  sched::HoldingId holding = 0;
};

// What has become of a request since the last report. Bits.
enum Happening : uint32_t {
  kPromptDone = 1,
  kFirstToken = 2,
  kLeaving = 4,
  kOver = 8,         // every output has ended
  kFailed = 16,      // the engine ended an output irregularly
  kOverflowed = 32,  // the client reads too slowly
  kAwaited = 64,     // messages are ready that somebody waits for
};

struct Report {
  struct Request {
    uint32_t slot;
    uint32_t happenings;
  };
  int64_t num_steps = 0;
  int64_t num_tokens = 0;
  std::vector<Request> requests;         // only those to which something happened
  std::vector<SequenceKey> ended_early;  // outputs that have ended, and their engine does not know
  std::vector<int64_t> tenant_tokens;    // by tenant
};

class Pump {
 public:
  // notify: called in Step()'s thread when a report has come up and none was waiting; may be empty.
  explicit Pump(std::function<void()> notify = {}) : notify_(std::move(notify)) {}
  Pump(const Pump&) = delete;
  Pump& operator=(const Pump&) = delete;

  // The first of num_outputs consecutive keys, which are never given again.
  SequenceKey Add(std::shared_ptr<Stream> stream, const Account& account);
  // What a key's request is in reports.
  static uint32_t SlotOf(SequenceKey key) { return static_cast<uint32_t>(key >> 8 & 0xFFFFFF); }
  static uint32_t OutputOf(SequenceKey key) { return static_cast<uint32_t>(key & 0xFF); }
  // Steps of these sequences pass unseen from now on. Returns the tokens that no report has told of and none
  // will. Idempotent.
  int64_t Remove(SequenceKey first);
  // Whether a key is of a request that was added and not removed.
  bool Has(SequenceKey key);

  // Whether it brought what Collect() should soon tell of: more than tokens for streams that are carried.
  bool Step(const StepOutputs& outputs, double now);
  // For engines that make text and ends themselves.
  void PutMade(SequenceKey first, Delta delta, double now);
  void PutPrompt(SequenceKey first, std::optional<uint32_t> num_cached_tokens, const LogprobList* logprobs,
                 double now);

  // Books tokens into the ledger, if any, and gives what there is to tell; valid until the next call.
  const Report& Collect(sched::KvLedger* ledger);

 private:
  // A key is a generation, a slot and an output index: 32, 24 and 8 bits.
  struct Slot {
    uint32_t generation = 0;
    std::shared_ptr<Stream> stream;
    Account account;
    int64_t num_tokens = 0;
    bool is_leaving = false;
    bool is_dirty = false;
    uint32_t happenings = 0;
    std::vector<int64_t> fresh;  // tokens since the last report, by output
  };

  Slot* Find(SequenceKey key);
  bool Note(SequenceKey key, Slot& slot, Effect effect, double now);
  void CarryParcels();
  void Wake(std::unique_lock<std::mutex>* lock);

  std::function<void()> notify_;
  std::mutex mutex_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  std::vector<uint32_t> dirty_;
  std::vector<SequenceKey> ended_early_;
  int64_t num_steps_ = 0;
  bool is_told_ = false;
  std::shared_ptr<Carrier> carrier_;      // of parcels_
  std::vector<Carrier::Parcel> parcels_;  // of one call
  Report report_;
};

}  // namespace twinjet::stream
