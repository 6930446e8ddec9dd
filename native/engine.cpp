// The schedule: pairs -> groups of tokens that stay in cache -> phases of independent tasks. No arithmetic here.
#include <algorithm>
#include <stdexcept>

#include <unistd.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "model.h"

namespace turborank {
namespace {

constexpr int kGroupTokens = 512;   // a group that one thread takes through all layers alone
constexpr int kAloneTokens = 512;   // pairs up to this length may be in such a group
constexpr int kLikeLength = 64;     // pairs of like length differ by less than this part of it
constexpr int kQueriesPerTask = 2048;
constexpr int kFewestRows = 8;        // for a thread: fewer are not worth waking it

int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Denormals count as zero while the kernels run, and rounding is to nearest; the caller's mode comes back afterwards.
class FloatMode {
public:
#if defined(__SSE__)
    FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }
    ~FloatMode() { _mm_setcsr(saved_); }

private:
    unsigned saved_;
#else
    FloatMode() {}
    ~FloatMode() {}
#endif
};

// Row t becomes row from[t] <= t as it was, for all t < n; rows are whole cache lines.
void spread(std::byte* rows, size_t bytes, const int32_t* from, int n) {
    for (int t = n - 1; t >= 0; --t)
        for (size_t i = 0; from[t] != t && i < bytes; i += 64)
            std::memcpy(rows + static_cast<size_t>(t) * bytes + i, rows + static_cast<size_t>(from[t]) * bytes + i, 64);
}

std::string at_pair(int p) { return " at pair " + std::to_string(p); }

}  // namespace

void Scratch::reserve(const Shape& s, int block_rows, int longest) {
    const size_t rows = static_cast<size_t>(block_rows + kSlackRows), D = static_cast<size_t>(s.D);
    const size_t depth = static_cast<size_t>(round_up(std::max(s.C, s.F), 64)), keys = static_cast<size_t>(round_up(longest, kTile));
    operand.reserve(rows * depth * 4);
    row_scale.reserve(2 * rows * 4);
    mixed.reserve(depth * 4);
    if (s.cosine) low.reserve(rows * static_cast<size_t>(std::max(3 * s.C, s.geglu ? 2 * s.F : s.F)) * 4), starts.reserve(rows * sizeof(float*));
    hidden.reserve(rows * static_cast<size_t>(std::max(s.F, 2 * s.C)) * 4);
    tiles.reserve(2 * kTile * kPanel * 4);
    queries.reserve(kTile * D * 4);
    values.reserve(keys * D * 4);
    bias.reserve((2 * keys + 4 * kTile) * 4);
    probabilities.reserve(kTile * kKeyChunk * 4);
    context.reserve(kTile * D * 4);
    if (!s.cosine) asked.reserve(static_cast<size_t>(s.H * s.C) * 4), weights.reserve(static_cast<size_t>(s.H) * keys * 4);
}

// Queries [from, to) of one head of a group's pair.
struct AttendTask {
    int pair, head, from, to;
};

// Some pairs of the batch, laid end to end, with the memory for their way through the layers.
struct Engine::Group {
    std::vector<int> pairs, starts;  // starts[i]: first row of pairs[i]
    int tokens = 0;
    bool team = false;               // all threads work on it together
    std::vector<AttendTask> attention;     // of one layer, heaviest first
};

struct Engine::Memory {
    Buffer x, q, k, v, attention;             // (T, C)
    Buffer first_x, first_attention;          // (P, C), the last layer of a classifier
    Buffer types;                             // (T,)
    // What the embedding and the first q, k and v are made of: each (id, type) once, if a row does not depend on its
    // place; `row` (T,) says which of those rows is token t's, never one behind it.
    Buffer ids, kinds, positions, row;
    int distinct = 0, capacity = 0;
    std::vector<int32_t> seen;                // by id and type; zero between calls

    static size_t types_of(const Shape& s) { return static_cast<size_t>(std::max(s.types, 2)); }
    int32_t& place(const Shape& s, int32_t id, int32_t type) { return seen[static_cast<size_t>(id) * types_of(s) + static_cast<size_t>(type)]; }

    void reserve(const Shape& s, int tokens, int pairs, size_t element) {
        capacity = std::max(capacity, tokens + kSlackRows);
        const size_t wide = static_cast<size_t>(capacity) * static_cast<size_t>(s.C), few = static_cast<size_t>(pairs + kSlackRows) * static_cast<size_t>(s.C);
        x.reserve(wide * 4);
        for (Buffer* b : {&q, &k, &v, &attention}) b->reserve(wide * element);
        first_x.reserve(few * 4);
        first_attention.reserve(few * element);
        for (Buffer* b : {&ids, &types, &kinds, &positions, &row}) b->reserve(static_cast<size_t>(capacity) * 4);
        if (!s.positions) seen.resize(static_cast<size_t>(s.vocab) * types_of(s));
    }
};

struct Engine::State {
    Pool pool;
    std::vector<Scratch> scratch;             // one a thread
    std::vector<std::unique_ptr<Memory>> memory;  // the team's, then one a thread
    pid_t process = getpid();
};

// One call.
struct Engine::Run {
    const Batch& batch;
    float* logits;
    std::vector<std::vector<float>>* trace;
    int threads;
};

Engine::Engine(std::unique_ptr<Packed> model, const Kernels* kernels) : model_(std::move(model)), kernels_(kernels) {}

Engine::~Engine() {
    // After a fork the pool's threads exist only in the parent: joining them here would wait for ever.
    if (state_ && state_->process != getpid()) state_.release();
}

void Engine::check(const Batch& b) const {
    const Shape& s = shape();
    const auto fail = [](const std::string& what) { throw std::invalid_argument(what); };
    if (b.ids.size() != b.types.size())
        fail("expected as many type_ids as input_ids (" + std::to_string(b.ids.size()) + "), got " + std::to_string(b.types.size()));
    if (b.offsets.size() < 2) fail("expected cu_seqlens of at least one pair (2 numbers), got " + std::to_string(b.offsets.size()));
    if (b.offsets[0] != 0) fail("expected cu_seqlens to begin with 0, got " + std::to_string(b.offsets[0]));
    if (b.offsets.back() < 0 || static_cast<size_t>(b.offsets.back()) != b.ids.size())
        fail("expected cu_seqlens to end with the number of tokens (" + std::to_string(b.ids.size()) + "), got " + std::to_string(b.offsets.back()));
    const int limit = s.positions > 0 ? std::min(s.max_length, s.positions - s.position_offset) : s.max_length;
    for (int p = 0; p < b.pairs(); ++p) {
        if (b.offsets[p + 1] <= b.offsets[p])
            fail("expected increasing cu_seqlens (no pair is empty), got " + std::to_string(b.offsets[p]) + " then " + std::to_string(b.offsets[p + 1]) + at_pair(p));
        if (b.offsets[p + 1] > b.offsets.back())
            fail("expected cu_seqlens of at most " + std::to_string(b.offsets.back()) + ", got " + std::to_string(b.offsets[p + 1]) + at_pair(p));
        if (b.length(p) > limit) fail("expected at most " + std::to_string(limit) + " tokens, got " + std::to_string(b.length(p)) + at_pair(p));
        bool seen[2] = {false, false};
        for (int t = b.offsets[p]; t < b.offsets[p + 1]; ++t) {
            const int id = b.ids[static_cast<size_t>(t)], type = b.types[static_cast<size_t>(t)];
            if (id < 0 || id >= s.vocab)
                fail("expected input_ids from 0 to " + std::to_string(s.vocab - 1) + ", got " + std::to_string(id) + " at token " + std::to_string(t));
            const int types = s.cosine ? 2 : s.types;  // a model with one segment has no use for the ids
            if (types > 1 && (type < 0 || type >= types))
                fail("expected type_ids from 0 to " + std::to_string(types - 1) + ", got " + std::to_string(type) + " at token " + std::to_string(t));
            seen[type != 0] = true;
        }
        if (s.cosine && !(seen[0] && seen[1])) fail("expected tokens of type 0 and of type 1, got only one type" + at_pair(p));
    }
}

// Short pairs are gathered into groups for one thread each, so that their activations stay in its cache and no
// thread waits for another. Long pairs of like length go to one thread each, where there is one for every thread; other
// long ones, and what does not divide evenly, form one group for the whole team.
std::vector<Engine::Group> Engine::plan(const Batch& batch, int threads, bool together) const {
    std::vector<Group> alone, result(1);
    const auto add = [&](Group& g, int p) {
        g.pairs.push_back(p), g.starts.push_back(g.tokens), g.tokens += batch.length(p);
    };
    std::vector<int> longs;
    for (int p = 0; p < batch.pairs(); ++p) {
        const int n = batch.length(p);
        if (together || (threads > 1 && n > kAloneTokens)) {
            longs.push_back(p);
            continue;
        }
        if (alone.empty() || alone.back().tokens + n > std::max(kGroupTokens, n) || alone.back().tokens >= kGroupTokens) alone.emplace_back();
        add(alone.back(), p);
    }
    if (!together) std::stable_sort(longs.begin(), longs.end(), [&](int p, int q) { return batch.length(p) > batch.length(q); });
    for (size_t i = 0; i < longs.size();) {
        const size_t end = i + static_cast<size_t>(threads);
        const int n = batch.length(longs[i]);
        const bool alike = !together && end <= longs.size() && n - batch.length(longs[end - 1]) <= n / kLikeLength;
        if (alike) for (; i < end; ++i) add(alone.emplace_back(), longs[i]);
        else add(result[0], longs[i++]);
    }
    std::stable_sort(alone.begin(), alone.end(), [](const Group& a, const Group& b) { return a.tokens > b.tokens; });
    for (; threads > 1 && alone.size() % static_cast<size_t>(threads); alone.pop_back())
        for (const int p : alone.back().pairs) add(result[0], p);
    result[0].team = true;
    if (result[0].pairs.empty()) result.clear();
    for (Group& g : alone) result.push_back(std::move(g));
    for (Group& g : result) plan_attention(batch, g, g.team ? threads : 1);
    return result;
}

// Tasks of whole (pair, head)s, or of ranges of queries where that would leave threads idle.
void Engine::plan_attention(const Batch& batch, Group& g, int threads) const {
    const int H = shape().H;
    for (int i = 0; i < static_cast<int>(g.pairs.size()); ++i) {
        const int n = batch.length(g.pairs[static_cast<size_t>(i)]);
        const int share = round_up((g.tokens * H + 4 * threads - 1) / (4 * threads), kTile);
        const int step = threads == 1 ? n : std::min(kQueriesPerTask, std::max(share, 4 * kTile));
        for (int h = 0; h < H; ++h)
            for (int from = 0; from < n; from += step) g.attention.push_back({i, h, from, std::min(n, from + step)});
    }
    if (threads == 1) return;
    std::stable_sort(g.attention.begin(), g.attention.end(), [&](const AttendTask& a, const AttendTask& b) {
        const int n = batch.length(g.pairs[static_cast<size_t>(a.pair)]), m = batch.length(g.pairs[static_cast<size_t>(b.pair)]);
        return n != m ? n > m : model_->weights.slopes[a.head] < model_->weights.slopes[b.head];
    });
}

void Engine::gather(const Batch& batch, const Group& g, Memory& m) const {
    const Shape& s = shape();
    int32_t *ids = m.ids.as<int32_t>(), *kinds = m.kinds.as<int32_t>();
    const auto list = [&](bool once) {
        m.distinct = 0;
        for (size_t i = 0; i < g.pairs.size(); ++i)
            for (int t = 0; t < batch.length(g.pairs[i]); ++t) {
                const size_t from = static_cast<size_t>(batch.offsets[static_cast<size_t>(g.pairs[i])] + t);
                const int32_t at = g.starts[i] + t, id = batch.ids[from], type = s.types > 1 || s.cosine ? batch.types[from] : 0;
                int32_t fresh = 0, &seen = once ? m.place(s, id, type) : fresh;
                if (seen == 0) {
                    ids[m.distinct] = id, kinds[m.distinct] = type, m.positions.as<int32_t>()[m.distinct] = t + s.position_offset;
                    seen = ++m.distinct;
                }
                m.types.as<int32_t>()[at] = type, m.row.as<int32_t>()[at] = seen - 1;
            }
        for (int i = 0; once && i < m.distinct; ++i) m.place(s, ids[i], kinds[i]) = 0;
    };
    list(!s.positions);
    if (!s.positions && m.distinct > g.tokens / 8 * 7) list(false);  // moving the rows would cost what it saves
}

AttendJob Engine::job(const Batch& batch, const Group& g, const AttendTask& task, const Memory& m) const {
    const Shape& s = shape();
    const size_t i = static_cast<size_t>(task.pair), h = static_cast<size_t>(task.head), element = kernels_->exchange_bytes;
    const size_t D = static_cast<size_t>(s.D), capacity = static_cast<size_t>(m.capacity), start = static_cast<size_t>(g.starts[i]);
    const size_t row = (h * capacity + start) * D * element;
    const size_t out = (start * static_cast<size_t>(s.C) + h * D) * element;
    return {m.q.as<std::byte>() + row, m.k.as<std::byte>() + row, m.v.as<std::byte>() + row, m.attention.as<std::byte>() + out,
            s.C, batch.length(g.pairs[i]), task.from, task.to, s.D, s.alibi, model_->weights.slopes[h]};
}

// What tells the kernels which rows are to be rounded more finely: those that the head's first mean is of.
const int32_t* Engine::fine_types(const Buffer& types, int from) const {
    return shape().cosine ? types.as<int32_t>() + from : nullptr;
}

// q, k and v of layer l for rows [from, from + rows), which have these types.
void Engine::project(Memory& m, const Buffer& types, int l, int from, int rows, Scratch& scratch) const {
    const Shape& s = shape();
    const float* x = m.x.as<float>() + static_cast<size_t>(from) * static_cast<size_t>(s.C);
    const Heads heads{m.q.as<void>(), m.k.as<void>(), m.v.as<void>(), m.capacity};
    kernels_->project_heads(s, model_->weights.layers[static_cast<size_t>(l)], x, fine_types(types, from), rows, heads, from, scratch);
}

void Engine::run_group(Run& run, const Group& g, Memory& m, Team& team, Scratch& scratch) const {
    const Weights& w = model_->weights;
    const Shape& s = w.shape;
    const size_t C = static_cast<size_t>(s.C);
    const int threads = g.team ? run.threads : 1, pairs = static_cast<int>(g.pairs.size());
    // Blocks of like size, whole tiles of rows, as many for each thread; where rows are few, like size matters more.
    const auto each_block = [&](int count, const auto& work) {
        const int unit = count >= 32 * threads * kernels_->row_tile ? kernels_->row_tile : kernels_->lowest_tile;
        const int units = (count + unit - 1) / unit;
        const int blocks = std::min(units, round_up((count + kernels_->block_rows - 1) / kernels_->block_rows, threads));
        team.phase(blocks, [&](int b) {
            const int from = units * b / blocks * unit, to = std::min(count, units * (b + 1) / blocks * unit);
            work(from, to - from);
        });
    };
    const auto note = [&](const Buffer& rows, int count) {
        if (run.trace) team.phase(1, [&](int) { run.trace->emplace_back(rows.as<float>(), rows.as<float>() + static_cast<size_t>(count) * C); });
    };

    const int whole = s.cosine ? s.L : s.L - 1;  // layers that every token goes through
    each_block(m.distinct, [&](int from, int rows) {
        kernels_->embed(w, m.ids.as<int32_t>() + from, m.kinds.as<int32_t>() + from, m.positions.as<int32_t>() + from, rows, m.x.as<float>() + static_cast<size_t>(from) * C, scratch);
        if (whole) project(m, m.kinds, 0, from, rows, scratch);
    });
    if (m.distinct < g.tokens)
        team.phase(3 * s.H + 1, [&](int i) {
            const Buffer* const heads[] = {&m.q, &m.k, &m.v};
            const size_t bytes = static_cast<size_t>(s.D) * kernels_->exchange_bytes, head = static_cast<size_t>(i % s.H) * static_cast<size_t>(m.capacity) * bytes;
            if (i < 3 * s.H) spread(heads[i / s.H]->as<std::byte>() + head, bytes, m.row.as<int32_t>(), g.tokens);
            else spread(m.x.as<std::byte>(), C * sizeof(float), m.row.as<int32_t>(), g.tokens);
        });
    note(m.x, g.tokens);
    for (int l = 0; l < whole; ++l) {
        team.phase(static_cast<int>(g.attention.size()), [&](int i) {
            kernels_->attend(job(run.batch, g, g.attention[static_cast<size_t>(i)], m), scratch);
        });
        each_block(g.tokens, [&](int from, int rows) {
            const size_t at = static_cast<size_t>(from) * C;
            kernels_->finish_layer(s, w.layers[static_cast<size_t>(l)], m.attention.as<std::byte>() + at * kernels_->exchange_bytes, m.x.as<float>() + at, fine_types(m.types, from), rows, scratch);
            if (l + 1 < whole) project(m, m.types, l + 1, from, rows, scratch);
        });
        note(m.x, g.tokens);
    }
    if (s.cosine) {
        team.phase(pairs, [&](int i) {
            const size_t at = static_cast<size_t>(g.starts[static_cast<size_t>(i)]);
            const int p = g.pairs[static_cast<size_t>(i)];
            run.logits[p] = kernels_->cosine(w, m.x.as<float>() + at * C, m.types.as<int32_t>() + at, run.batch.length(p), scratch);
        });
        return;
    }
    team.phase(pairs, [&](int i) {
        const float* x = m.x.as<float>() + static_cast<size_t>(g.starts[static_cast<size_t>(i)]) * C;
        const size_t to = static_cast<size_t>(i) * C;
        std::copy_n(x, s.C, m.first_x.as<float>() + to);
        kernels_->attend_first(w, x, run.batch.length(g.pairs[static_cast<size_t>(i)]), m.first_attention.as<std::byte>() + to * kernels_->exchange_bytes, scratch);
    });
    team.phase((pairs + kTile - 1) / kTile, [&](int b) {
        const int count = std::min(kTile, pairs - b * kTile);
        const size_t at = static_cast<size_t>(b * kTile) * C;
        float* x = m.first_x.as<float>() + at;
        float logits[kTile];
        kernels_->finish_layer(s, w.layers.back(), m.first_attention.as<std::byte>() + at * kernels_->exchange_bytes, x, nullptr, count, scratch);
        kernels_->classify(w, x, count, logits, scratch);
        for (int i = 0; i < count; ++i) run.logits[g.pairs[static_cast<size_t>(b * kTile + i)]] = logits[i];
    });
    note(m.first_x, pairs);
}

void Engine::logits(const Batch& batch, int threads, float* out, std::vector<std::vector<float>>* trace) {
    check(batch);
    if (threads < 1) throw std::invalid_argument("expected threads of at least 1, got " + std::to_string(threads));
    threads = std::min(threads, (batch.offsets.back() + kFewestRows - 1) / kFewestRows);
    std::unique_lock<std::mutex> lock(calls_);
    if (state_ && state_->process != getpid()) state_.release();  // see ~Engine
    if (!state_) state_ = std::make_unique<State>();
    State& state = *state_;

    std::vector<Group> groups = plan(batch, threads, trace != nullptr);
    int longest = 0, most = 0, pairs = 0;
    for (int p = 0; p < batch.pairs(); ++p) longest = std::max(longest, batch.length(p));
    while (static_cast<int>(state.scratch.size()) < threads) state.scratch.emplace_back();
    while (static_cast<int>(state.memory.size()) < threads + 1) state.memory.push_back(std::make_unique<Memory>());
    for (const Group& g : groups)
        if (!g.team) most = std::max(most, g.tokens), pairs = std::max(pairs, static_cast<int>(g.pairs.size()));
    for (int i = 0; i < threads; ++i) {
        state.scratch[static_cast<size_t>(i)].reserve(shape(), kernels_->block_rows + kernels_->row_tile, longest);
        if (most) state.memory[static_cast<size_t>(i) + 1]->reserve(shape(), most, pairs, kernels_->exchange_bytes);
    }
    const bool has_team = !groups.empty() && groups[0].team;
    if (has_team) {
        state.memory[0]->reserve(shape(), groups[0].tokens, static_cast<int>(groups[0].pairs.size()), kernels_->exchange_bytes);
        gather(batch, groups[0], *state.memory[0]);
    }

    Run run{batch, out, trace, threads};
    Team team(threads);
    std::atomic<size_t> next{has_team ? 1u : 0u};
    const std::function<void(int)> work = [&](int id) {
        const FloatMode mode;
        kernels_->enter();
        Scratch& scratch = state.scratch[static_cast<size_t>(id)];
        if (has_team) run_group(run, groups[0], *state.memory[0], team, scratch);
        Team self(1);
        Memory& own = *state.memory[static_cast<size_t>(id) + 1];
        for (size_t g; (g = next.fetch_add(1)) < groups.size();) {
            gather(batch, groups[g], own);
            run_group(run, groups[g], own, self, scratch);
        }
        kernels_->leave();
    };
    state.pool.run(threads, work);
}

std::array<double, kParts> Engine::spent() {
    const std::lock_guard<std::mutex> lock(calls_);
    std::array<double, kParts> total{};
    if (!state_) return total;
    for (const Scratch& scratch : state_->scratch)
        for (int part = 0; part < kParts; ++part) total[static_cast<size_t>(part)] += 1e-9 * static_cast<double>(scratch.spent[part]);
    return total;
}

}  // namespace turborank
