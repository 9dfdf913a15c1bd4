// How one thread goes through its part of a product: panels of the right side, each against rows of the left side, in
// pieces that stay in the second-level cache.
#include "product.h"

#include "product_finish.h"
#include "product_int8.h"
#include "threads.h"

using namespace deltaw;

namespace {

const int64_t GROUPS_AT_ONCE = 768;      // 96 KiB of right side, which stay in the second-level cache
const int64_t GROUPS_OF_MANY = 256;      // where there are more: sums, left and right sides stay there together
const int64_t LEFT_AT_ONCE = 448 << 10;  // bytes of left side that stay beside it while columns go by
const int64_t KEPT_AT_MOST = 4 << 20;    // bytes of right side that are laid out once for all rows

template <class Op, class LowOp>
class Part {
  public:
    Part(const Product &p, int thread, int threads) : p(p) { share_out(thread, threads); }

    void run() {
        if (begin == end) return;
        Scratch scratch;
        lay_room(scratch);
        for (int64_t b0 = 0; b0 < cut; b0 += block)
            for (int64_t g0 = 0; g0 < groups || g0 == 0; g0 += most_groups) run_pieces(b0, g0, std::min(groups - g0, most_groups));
    }

  private:
    static constexpr bool INT8_SUMS = Op::PER_GROUP == 4;
    static constexpr int64_t NUMBER = 4 / Op::PER_GROUP;  // bytes
    static constexpr int64_t BLOCK_GROUPS = INT8_BLOCK / 4;

    const Product &p;
    const bool in_blocks = INT8_SUMS && p.block_scale;
    const int64_t blocks = int8_blocks(p.K);
    const int64_t groups = (p.K + Op::PER_GROUP - 1) / Op::PER_GROUP;
    const int64_t low_groups = (p.rank + LowOp::PER_GROUP - 1) / LowOp::PER_GROUP;
    const bool several = groups > GROUPS_AT_ONCE;
    const int64_t most_groups = several ? GROUPS_OF_MANY : GROUPS_AT_ONCE;
    const int64_t line = std::min(groups, most_groups);

    // Rows row0 … row1-1 of the left side are this thread's, cut into `cuts` ranges; pieces are (panel, range).
    int64_t row0 = 0, row1 = 0, cuts = 1, begin = 0, end = 0;
    int64_t cut = 0, block = 0;           // rows of a range, and of those that go by at a time
    int64_t first_panel = 0, own = 0;     // panels of this thread
    bool keep = false;                    // panels are laid out for the first block of rows and kept for the others
    bool gather = false;                  // rows are copied to lie side by side
    int64_t stride = 0;                   // bytes from row to row
    int64_t starts_each = 0;

    char *right = nullptr, *low_right = nullptr, *gathered = nullptr;
    int32_t *starts = nullptr;
    float *tiles = nullptr;
    alignas(64) float small[MOST_ROWS * PANEL];

    // Many rows are shared out among the threads, so that each finds its rows in its own cache, where the norm or the
    // product before has left them. Else pieces are shared out, and rows are cut only where panels alone would not
    // share out evenly.
    void share_out(int thread, int threads) {
        const int64_t panels = (p.N + PANEL - 1) / PANEL;
        row1 = p.M, end = panels;
        if (p.M >= ROWS_FOR_EACH * threads) part_of(p.M, thread, threads, row0, row1);
        else {
            while (cuts * 2 * 24 <= p.M && cuts < 64) {
                const int64_t pieces = panels * cuts, most = (pieces + threads - 1) / threads;
                if (most * threads * 16 <= pieces * 17) break;
                cuts *= 2;
            }
            part_of(panels * cuts, thread, threads, begin, end);
        }
    }

    void lay_room(Scratch &scratch) {
        cut = (row1 - row0 + cuts - 1) / cuts + 1;
        block = std::min(cut, std::max<int64_t>(8, LEFT_AT_ONCE / (std::max<int64_t>(line, 1) * 4) / MOST_ROWS) * MOST_ROWS);
        first_panel = begin / cuts, own = (end - 1) / cuts + 1 - first_panel;
        keep = !several && block < cut && own * line * 128 <= KEPT_AT_MOST;
        starts_each = (in_blocks ? (line + BLOCK_GROUPS - 1) / BLOCK_GROUPS : 1) * PANEL;
        // Parts of rows whose distance is a large power of two would fall on the same few places of the cache.
        gather = several && cuts == 1 && p.left_ld * NUMBER % 1024 == 0;
        stride = gather ? line * 4 : p.left_ld * NUMBER;
        right = scratch.take((keep ? own : 1) * line * 128);
        low_right = scratch.take(low_groups * 128);
        if (INT8_SUMS) starts = scratch.take<int32_t>((keep ? own : 1) * starts_each);
        if (several) tiles = scratch.take<float>((end - begin) * block * PANEL);
        if (gather) gathered = scratch.take(block * line * 4);
    }

    // All pieces of one block of rows from b0 on, over `deep` groups from g0 on.
    void run_pieces(int64_t b0, int64_t g0, int64_t deep) {
        if (gather)
            for (int64_t m = 0; m < std::min(block, row1 - row0 - b0); m++)
                memcpy(gathered + m * line * 4, (const char *)p.left + ((row0 + b0 + m) * p.left_ld + g0 * Op::PER_GROUP) * NUMBER, deep * 4);
        int64_t packed = -1, share = 0;
        Ahead ahead;
        for (int64_t piece = begin; piece < end; piece++) {
            int64_t m0, m1;
            part_of(row1 - row0, (int)(piece % cuts), (int)cuts, m0, m1);
            m0 += row0 + b0;
            m1 = std::min(m1 + row0, m0 + block);
            if (m0 >= m1) continue;
            const int64_t panel = piece / cuts, place = keep ? panel - first_panel : 0;
            if (packed != panel) {
                packed = panel;
                share = lay_out(panel, place, m1 - m0, b0, g0, deep, ahead);
            }
            multiply(piece, panel * PANEL, place, m0, m1, b0, g0, deep, share, ahead);
        }
    }

    // Packs a panel where it is not there yet; how many lines of the next one to fetch at each step.
    int64_t lay_out(int64_t panel, int64_t place, int64_t rows, int64_t b0, int64_t g0, int64_t deep, Ahead &ahead) {
        const int64_t n0 = panel * PANEL;
        if (p.rank && g0 + most_groups >= groups) pack<LowOp>(p.low_right, p.rank, p.N, n0, 0, low_groups, low_right);
        ahead.rows = 0;
        if (keep && b0 > 0) return 0;
        char *const here = right + place * line * 128;
        pack<Op>(p.right, p.K, p.N, n0, g0, deep, here);
        if (INT8_SUMS) {
            int32_t *const start = starts + place * starts_each;
            for (int64_t g = 0; g < deep; g += in_blocks ? BLOCK_GROUPS : deep)
                starts_of_columns(here + g * 128, in_blocks ? std::min(BLOCK_GROUPS, deep - g) : deep, vecs_at(n0), p.left_zero,
                                  start + (in_blocks ? g / BLOCK_GROUPS * PANEL : 0));
        }
        const int64_t next = ((end - 1) / cuts > panel) ? panel + 1 : first_panel;
        const int64_t next_g0 = next > panel ? g0 : g0 + most_groups;
        if (next_g0 < groups) ahead.panel<Op>(p.right, p.K, p.N, next * PANEL, next_g0, std::min(groups - next_g0, most_groups));
        return ahead.lines() * MOST_ROWS / std::max<int64_t>(MOST_ROWS, rows / MOST_ROWS * MOST_ROWS) + 1;
    }

    void multiply(int64_t piece, int64_t n0, int64_t place, int64_t m0, int64_t m1, int64_t b0, int64_t g0, int64_t deep, int64_t share,
                  Ahead &ahead) {
        const int vecs = vecs_at(n0);
        const bool last = g0 + most_groups >= groups;
        const char *const here = right + place * line * 128;
        const int32_t *const start = INT8_SUMS ? starts + place * starts_each : nullptr;
        for (int64_t m = m0; m < m1;) {
            const int rows = rows_at_once(m1 - m);
            float *const tile = several ? tiles + ((piece - begin) * block + m - m0) * PANEL : small;
            const char *left = gather ? gathered + (m - row0 - b0) * line * 4
                                      : (const char *)p.left + (m * p.left_ld + g0 * Op::PER_GROUP) * NUMBER;
            ahead.fetch(share);
            if (in_blocks) {
                const float *const scales = p.block_scale + m * blocks + g0 / BLOCK_GROUPS;
                if (vecs == 2) add_blocks_of<2>(rows, left, stride, here, deep, start, scales, blocks, g0 == 0, tile);
                else add_blocks_of<1>(rows, left, stride, here, deep, start, scales, blocks, g0 == 0, tile);
            } else if (g0 == 0 && !INT8_SUMS) products<Op>(rows, vecs, left, stride, here, deep, tile, PANEL);
            else {
                // In int8, each part of a sum has a start of its own.
                if (INT8_SUMS && g0 > 0) add_starts(tile, rows, vecs, start);
                const float *const from = g0 > 0 ? tile : (const float *)start;
                products_onto<Op>(rows, vecs, left, stride, here, deep, from, g0 > 0 ? PANEL : 0, tile, PANEL);
            }
            if (last) {
                if (vecs == 2) finish_rows<LowOp, 2>(rows, p, tile, INT8_SUMS && !in_blocks, m, n0, low_right, low_groups);
                else finish_rows<LowOp, 1>(rows, p, tile, INT8_SUMS && !in_blocks, m, n0, low_right, low_groups);
            }
            m += rows;
        }
    }

    int vecs_at(int64_t n0) const { return p.N - n0 > 16 ? 2 : 1; }
};

}  // namespace

void deltaw::run_product(const Product &p, int type, int thread, int threads) {
    if (p.M <= 0 || p.N <= 0) return;
    if (type == F32) Part<OpF32, OpF32>(p, thread, threads).run();
    else if (type == BF16) Part<OpBF16, OpBF16>(p, thread, threads).run();
    else if (p.out_type == F32) Part<OpInt8, OpF32>(p, thread, threads).run();
    else Part<OpInt8, OpBF16>(p, thread, threads).run();
}

void deltaw::run_product(const Product &p, int type) {
    in_parallel([&](int thread, int threads) { run_product(p, type, thread, threads); });
}
